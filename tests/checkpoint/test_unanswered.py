"""A store that does not answer one request: whichever it is, nothing complete is lost, and no other checkpoint is taken for
the newest or the best."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import small_config
from fsspec.implementations.memory import MemoryFileSystem
from saving import save
from upath import UPath

from lejepa_scale.checkpoint import Saved, Store, find
from lejepa_scale.checkpoint.places import Place, place
from lejepa_scale.checkpoint.saved import damage
from lejepa_scale.checkpoint.saver import NotSaved
from lejepa_scale.config import validate
from lejepa_scale.data.mixture import open_mixture
from lejepa_scale.errors import Exit, UserError
from lejepa_scale.training import loop, resume

REQUESTS = ("_open", "cat_file", "cp_file", "info", "ls", "pipe_file", "rm_file", "rmdir")


class Requests:
    """Those that a store gets from one thread after another, of which one, by its number, is not answered: it never came
    there, or, with `done`, was carried out."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.made, self.done, self._fails = 0, False, -1
        for name in REQUESTS:
            patch.setattr(MemoryFileSystem, name, self._counted(getattr(MemoryFileSystem, name)))

    def _counted(self, request: Callable[..., Any]) -> Callable[..., Any]:
        def asked(*arguments: Any, **options: Any) -> Any:
            self.made += 1
            fails = self.made - 1 == self._fails
            answer = None if fails and not self.done else request(*arguments, **options)
            if fails:
                raise ConnectionError("no answer\nfrom the server")
            return answer

        return asked

    @contextmanager
    def failing(self, number: int) -> Iterator[None]:
        """The one of that number, from here."""
        self.made, self._fails = 0, number
        yield
        self._fails = -1


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Requests:
    return Requests(monkeypatch)


def new_root() -> UPath:
    return place(f"memory://bucket/{uuid.uuid4().hex}")  # type: ignore[return-value]


def saved_three(tmp_path: Path, keep: int = 3) -> Store:
    """Checkpoints 1 to 3, of which 2 is the best."""
    tmp_path.mkdir(exist_ok=True)
    store = Store(tmp_path, keep, best="max:knn", root=new_root())
    for step, knn in ((1, 1.0), (2, 9.0), (3, 2.0)):
        save(store, step, metrics={"knn": knn})
    return store


def outcomes(requests: Requests, work: Callable[[], Any], before: Callable[[], None] = lambda: None) -> list[Any]:
    """What the work gives where its first request fails, its second, and so on until none does; errors as they are. before:
    what is done before each."""
    found: list[Any] = []
    while True:
        before()
        with requests.failing(len(found)):
            try:
                found.append(work())
            except Exception as error:
                found.append(error)
        if requests.made <= len(found) - 1:  # the last of them was answered
            return found


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (lambda root: Store(Path(), 3, root=root).latest(), "step_00000003"),
        (lambda root: Store(Path(), 3, best="max:knn", root=root).best(), "step_00000002"),
        (lambda root: find(str(root)), "step_00000003"),
        (lambda root: find(f"{root}/step_00000002"), "step_00000002"),
        (lambda root: Saved(root / "step_00000002").path, "step_00000002"),
    ],
)
def test_a_question_gets_its_answer_or_an_error(
    tmp_path: Path, requests: Requests, question: Callable[[Place], Place], answer: str
) -> None:
    root = saved_three(tmp_path).root
    found = outcomes(requests, lambda: question(root))
    assert len(found) > 1
    for one in found[:-1]:
        if isinstance(one, Exception):
            assert isinstance(one, UserError), repr(one)
            assert "cannot be read: no answer." in str(one)
            assert one.status == Exit.FAULT
            assert "delete" not in str(one)
        else:
            assert one.name == answer
    assert found[-1].name == answer


def test_what_is_not_answered_is_no_damage(tmp_path: Path, requests: Requests) -> None:
    path = saved_three(tmp_path).root / "step_00000003"
    found = outcomes(requests, lambda: damage(path))
    assert len(found) > 10
    assert found[-1] is None
    assert {type(one) for one in found[:-1]} <= {UserError, type(None)}


def test_a_right_that_is_lacking_will_be_so_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = saved_three(tmp_path)

    def refused(*_: Any, **__: Any) -> Any:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(MemoryFileSystem, "ls", refused)
    with pytest.raises(UserError, match=r"cannot be read: Access Denied\.$") as caught:
        store.latest()
    assert caught.value.status == Exit.MISTAKE


@pytest.mark.parametrize("done", [False, True])
def test_a_save_loses_nothing(tmp_path: Path, requests: Requests, done: bool) -> None:
    """It is saved, or an error says that it is not; those before it stay, but for one that need not be kept."""
    requests.done = done
    first, before = saved_three(tmp_path, keep=1), ["step_00000002", "step_00000003"]
    assert [path.name for path in first.complete()] == before
    files = {file.relative_to(first.root): file.read_bytes() for file in first.root.rglob("*") if file.is_file()}
    stores: list[Store] = []

    def another() -> None:
        stores.append(Store(tmp_path, 1, best="max:knn", root=new_root()))
        for name, data in files.items():
            (stores[-1].root / str(name)).write_bytes(data)

    found = outcomes(requests, lambda: save(stores[-1], 4, metrics={"knn": 3.0}), another)
    failed = [one for one in found if isinstance(one, Exception)]
    assert len(found) > len(failed) > 10
    for one, store in zip(found, stores, strict=True):
        after = [path.name for path in store.complete()]
        assert "step_00000002" in after  # the best
        assert store.latest() is not None
        assert all(damage(path) is None for path in store.complete())
        if isinstance(one, Exception):
            assert isinstance(one, NotSaved), repr(one)
            assert "no answer" in str(one)
            assert after[:2] == before
        else:
            assert after[-1] == "step_00000004"
        save(store, 5)
        assert [path.name for path in store.complete()] == ["step_00000002", "step_00000005"]
        assert {path.name for path in store.root.iterdir()} == {"step_00000002", "step_00000005"}


def test_a_resume_goes_on_from_the_newest_or_not_at_all(tmp_path: Path, scenes: Path, requests: Requests) -> None:
    root = new_root()
    config = validate(
        small_config(
            tmp_path / "run",
            scenes,
            checkpoint={"every": 1, "keep": 3, "dir": str(root)},
            train={"steps": 2, "global_batch": 16},
        )
    )
    loop.train(config)
    store = Store(config.run.dir, 3, root=root)
    found = outcomes(requests, partial(resume.resume, config, store, open_mixture(config.data)))
    assert len(found) > 20
    for one in found:
        if isinstance(one, Exception):
            assert isinstance(one, UserError), repr(one)
            assert "no answer" in str(one)
        else:
            assert one[0].path.name == "step_00000002"
    assert [path.name for path in store.complete()] == ["step_00000001", "step_00000002"]
