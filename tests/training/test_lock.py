"""One run, one directory: a second start is refused with who and since when, and a lock that nobody holds is taken over."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Command, small_config
from upath import UPath

from lejepa_scale.errors import UserError
from lejepa_scale.parallel import living
from lejepa_scale.training import lock
from lejepa_scale.training.lock import locked


def held(path: Path, **changes: Any) -> dict[str, Any]:
    """A lock of somebody."""
    found = lock._myself() | changes
    (path / "lock").write_text(json.dumps(found))
    return found


def test_a_second_start_is_refused_with_who_and_since_when(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        since = json.loads((tmp_path / "run/lock").read_text())["since"]
        with (
            pytest.raises(
                UserError,
                match=rf"run is in use by process {os.getpid()} on {socket.gethostname()}, since {since}\. .* another run",
            ),
            locked(tmp_path / "run"),
        ):
            pass
        assert [p.name for p in (tmp_path / "run").iterdir()] == ["lock"]
        (tmp_path / "run/metrics.jsonl").touch()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
    with locked(tmp_path / "run"):
        pass


def test_a_directory_that_nothing_came_into_goes_again(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="refused"), locked(tmp_path / "run"):
        raise ValueError("refused")
    assert not (tmp_path / "run").exists()
    (tmp_path / "kept").mkdir()
    with locked(tmp_path / "kept"):
        pass
    assert (tmp_path / "kept").exists()


def _hold(folder: Path, ready: Any) -> None:
    with locked(folder):
        ready.set()
        signal.pause()


@pytest.mark.parametrize("reaped", [True, False])
def test_the_lock_of_a_killed_process_is_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, reaped: bool
) -> None:
    """At once, also where its parent has not looked yet."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(20)
    with pytest.raises(UserError, match=f"process {process.pid} on "), locked(tmp_path):
        pass
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    if reaped:
        process.join(20)
    else:
        while living.begun(process.pid) is not None:
            time.sleep(0.01)
    with locked(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert f"process {process.pid} on " in caplog.text
    assert "which is gone: this run takes it over" in caplog.text
    process.join(20)


def test_a_number_that_another_process_has_now_is_no_sign_of_life(tmp_path: Path) -> None:
    held(tmp_path, begun="1")
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"namespace": "pid:[1]"}])
@pytest.mark.parametrize("beats", [True, False])
def test_whose_processes_we_do_not_see_shows_its_life_by_beats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, str], beats: bool
) -> None:
    """Another machine, or another container of the same name."""
    monkeypatch.setattr(lock, "WATCH_SECONDS", 30.0 if beats else 1.0)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)
    mine, over = held(tmp_path, **other), threading.Event()
    if beats:
        threading.Thread(target=lock._beat, args=(tmp_path / "lock", mine, over), daemon=True).start()
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on {mine['host']}"), locked(tmp_path):
            pass
        over.set()
    else:
        with locked(tmp_path):
            pass


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[int], bool]], UPath]]:
    """A store with the lock of another machine, whose reads fail where told so by their number."""

    def build(fails: Callable[[int], bool]) -> UPath:
        root = UPath(f"memory://{uuid.uuid4()}")
        (root / "lock").write_text(json.dumps(lock._myself() | {"host": "elsewhere", "pid": 7}))
        numbers, read = count(), type(root).read_bytes

        def failing(path: UPath) -> bytes:
            if fails(next(numbers)):
                raise ConnectionError("no answer\nmore")
            return read(path)

        monkeypatch.setattr(type(root), "read_bytes", failing)
        monkeypatch.setattr(lock, "WATCH_SECONDS", 0.5)
        return root

    yield build
    monkeypatch.undo()


def test_a_store_that_does_not_answer_for_a_while_is_no_sign_of_death(
    store: Callable[..., UPath], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = store(lambda number: 1 <= number < 5)
    monkeypatch.setattr(lock, "WATCH_SECONDS", 30.0)
    monkeypatch.setattr(lock.time, "sleep", lambda _: None)
    reads = count()

    def changing(path: UPath) -> bytes:
        if next(reads) == 6:
            path.write_bytes(json.dumps(json.loads(failing(path)) | {"beat": 1}).encode())
        return failing(path)

    failing = type(root).read_bytes
    monkeypatch.setattr(type(root), "read_bytes", changing)
    with pytest.raises(UserError, match="is in use by process 7 on elsewhere"), locked(root):
        pass
    assert json.loads((root / "lock").read_text())["pid"] == 7


@pytest.mark.parametrize("answers", [0, 1, 2])
def test_a_lock_that_a_store_does_not_show_stays(store: Callable[..., UPath], answers: int) -> None:
    root = store(lambda number: number >= answers)
    with pytest.raises(UserError, match=rf"^{root} cannot be written: no answer\.$"), locked(root):
        pass
    assert json.loads((root / "lock").read_text())["pid"] == 7


def test_a_lock_that_cannot_be_removed_is_not_tried_for_ever(
    store: Callable[..., UPath], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a store grants writing, and no deleting."""
    root = store(lambda _: False)

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(type(root), "unlink", refused)
    with pytest.raises(UserError, match=r"cannot be written: Access Denied\.$"), locked(root):
        pass
    assert json.loads((root / "lock").read_text())["pid"] == 7


def test_the_lock_of_one_that_is_gone_is_taken_over_in_a_store(store: Callable[..., UPath]) -> None:
    root = store(lambda number: number == 2)
    with locked(root):
        assert json.loads((root / "lock").read_text())["pid"] == os.getpid()
    assert not (root / "lock").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", "\0\0"])
def test_a_lock_that_cannot_be_read_is_taken_over(tmp_path: Path, text: str) -> None:
    (tmp_path / "lock").write_text(text)
    with locked(tmp_path):
        assert lock._holder(tmp_path / "lock") is not None


def test_a_lock_that_another_run_has_taken_is_not_removed(tmp_path: Path) -> None:
    with locked(tmp_path):
        theirs = held(tmp_path, pid=1)
    assert lock._holder(tmp_path / "lock") == theirs


def test_where_nothing_can_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"\S*/file/run cannot be written: Not a directory"),
        locked(tmp_path / "file/run"),
    ):
        pass


def test_a_run_in_a_directory_that_is_in_use_is_refused_on_every_rank(
    tmp_path: Path, scenes: Path, command: Command
) -> None:
    tree = small_config(tmp_path / "run", scenes, engine={"name": "ddp"})
    script = (ROOT / "launchers/train.py", "--config", command.config(tree))
    with locked(tmp_path / "run"):
        result = command(*script, ranks=2)
        assert result.returncode not in (0, None)
        assert f"is in use by process {os.getpid()}" in result.stderr
    assert command(*script, ranks=2).returncode == 0
    assert not (tmp_path / "run/lock").exists()
