"""Checkpoints survive what happens to files: interruption, deletion, damage, foreign names, a full disk."""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from saving import Holder, save, values

from lejepa_scale.checkpoint import Progress, Saved, Saver, Store, files, saver
from lejepa_scale.checkpoint import store as stores
from lejepa_scale.checkpoint.layout import boxes, divided, key
from lejepa_scale.checkpoint.saved import damage, marked, verify
from lejepa_scale.checkpoint.saver import NotSaved
from lejepa_scale.checkpoint.store import find
from lejepa_scale.engine.base import VALUE
from lejepa_scale.errors import UserError
from lejepa_scale.training import resume


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=2)
    assert store.latest() is None
    path = save(store, 5)
    saved = Saved(path)
    assert saved.progress == Progress(5, "shards", updates=7)
    assert saved.moments
    assert saved.config_text() == "run: {}\n"
    assert saved.shapes == {"a.weight": (3, 2), "b": (), "running": (2,), "count": ()}
    for kind, tensors in values(5.0).items():
        for name, tensor in tensors.items():
            assert torch.equal(saved.whole(name, kind), tensor)
    assert torch.equal(saved.whole("count"), torch.tensor(3))
    assert torch.equal(saved.read("a.weight", "exp_avg", 1, 4), torch.arange(1.0, 5) + 105)
    assert saved.read("a.weight", length=0).numel() == 0
    assert torch.equal(saved.probe()["head"], torch.ones(2))
    verify(path)


def test_its_files_are_read_without_us(tmp_path: Path) -> None:
    path = save(Store(tmp_path, keep=2), 5)
    model, optimizer = load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors")
    assert torch.equal(model["a.weight"], values(5.0)[VALUE]["a.weight"])
    assert sorted(model) == ["a.weight", "b", "count", "running"]
    assert torch.equal(optimizer["exp_avg_sq/b"], values(5.0)["exp_avg_sq"]["b"])
    state = json.loads((path / "state.json").read_text())
    assert (state["step"], state["ranks"], state["torch"]) == (5, 1, torch.__version__)
    mask = os.umask(0)
    os.umask(mask)
    assert {stat.S_IMODE(p.stat().st_mode) for p in path.iterdir()} == {0o666 & ~mask}


@pytest.mark.parametrize("dtype", files.DTYPES)
def test_every_type_is_written_as_safetensors_does(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.arange(6).view(2, 3), "": torch.tensor(1), "empty": torch.empty(0, 2)}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    written = files.write_safetensors(tmp_path / "a", [files.Entry.of(name, x.shape, x) for name, x in tensors.items()])
    save_file(tensors, tmp_path / "b")
    for found in (load_file(tmp_path / "a"), load_file(tmp_path / "b")):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], x) and found[name].dtype == dtype for name, x in tensors.items())
    assert written == files.Written((tmp_path / "a").stat().st_size, files.checksum(tmp_path / "a"))


# -- which elements are where


def test_boxes_are_the_flat_range_in_order() -> None:
    """For every range of some shapes: contiguous rectangles, as few as can be, which numpy's own slicing puts together."""
    for shape in [(), (5,), (3, 4), (2, 3, 4), (1, 1, 6), (4, 1, 3)]:
        flat = np.arange(int(np.prod(shape))).reshape(shape)
        for start in range(flat.size + 1):
            for length in range(flat.size - start + 1):
                found = boxes(shape, start, length)
                taken = [flat[box].reshape(-1) for box in found]
                np.testing.assert_array_equal(np.concatenate([*taken, []]), flat.reshape(-1)[start : start + length])
                assert len(found) <= max(1, 2 * len(shape) - 1)
                assert len({key("w", shape, box) for box in found}) == len(found)


def test_each_part_is_written_once_and_shared_out() -> None:
    shapes = {"a": (4, 2), "b": (3,), "c": (10,)}
    replicas = np.array([[(0, 8), (0, 3), (0, 10)]] * 3)
    layout = divided(shapes, replicas)
    assert [part.rank for parts in layout.parts.values() for part in parts] == [0, 1, 2]
    shards = np.array([[(0, 5), (0, 0), (0, 4)], [(5, 3), (0, 3), (4, 6)]])
    layout = divided(shapes, shards)
    assert [(p.rank, p.start, p.length) for p in layout.parts["c"]] == [(0, 0, 4), (1, 4, 6)]
    assert set(layout.of_rank(0)) == {"a", "c"}
    hybrid = np.array([[(0, 4)], [(4, 4)], [(0, 4)], [(4, 4)]])  # two replicas of two shards
    assert len(divided({"a": (4, 2)}, hybrid).parts["a"]) == 2
    for wrong in ([[(0, 4)], [(5, 3)]], [[(0, 5)], [(4, 4)]], [[(0, 4)], [(4, 3)]]):
        with pytest.raises(RuntimeError, match="do not tile it"):
            divided({"a": (4, 2)}, np.array(wrong))


# -- what counts, and what goes


def test_the_newest_are_kept_and_remains_are_cleared(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=2)
    (tmp_path / "checkpoints/step_00000003.partial").mkdir(parents=True)
    for step in (1, 2, 10):
        save(store, step)
    assert names(tmp_path) == ["step_00000002", "step_00000010"]
    assert find(tmp_path).name == "step_00000010"
    assert find(tmp_path / "checkpoints/step_00000002").name == "step_00000002"


def test_what_a_user_has_put_beside_them_is_left_alone(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=1)
    save(store, 1)
    theirs = [
        "best_step_00000012",
        "z_step_00000008",
        "step_00000001.old",
        "step_12",
        "my.partial",
        "step_00000009.damaged",
    ]
    marker = (tmp_path / "checkpoints/step_00000001/COMPLETE").read_bytes()
    for name in theirs:
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "COMPLETE").write_bytes(marker)
    assert store.latest() == tmp_path / "checkpoints/step_00000001"
    save(store, 2)
    assert names(tmp_path) == sorted([*theirs, "step_00000002"])


def test_steps_are_ordered_by_number(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=3)
    for step in (99_999_999, 100_000_000):
        save(store, step)
    assert store.latest() == tmp_path / "checkpoints/step_100000000"


def test_every_mth_is_kept_for_good(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=1, keep_every=4)
    for step in range(1, 10):
        save(store, step)
    assert names(tmp_path) == ["step_00000004", "step_00000008", "step_00000009"]


@pytest.mark.parametrize(
    ("best", "kept", "named"),
    [("max:accuracy", [3, 6], "3 accuracy 0.9"), ("min:loss", [4, 6], "4 loss 0.25"), (None, [6], None)],
)
def test_the_best_by_a_metric_is_kept(tmp_path: Path, best: str | None, kept: list[int], named: str | None) -> None:
    """Of equal ones the newest; what is no number, or was not measured, never; also by a store that finds them."""
    accuracies = {1: 0.9, 2: 0.1, 3: 0.9, 4: 0.2, 5: None, 6: 0.8}
    losses = {1: 0.5, 2: 0.3, 3: float("nan"), 4: 0.25, 5: 0.25, 6: float("inf")}
    for step in range(1, 7):
        metrics = {"accuracy": accuracies[step]} | ({"loss": losses[step]} if step != 5 else {})
        store = Store(tmp_path, keep=1, best=best)
        background = Saver(store, Holder(values(float(step))))
        background.begin(Progress(step, "shards"), {}, "run: {}\n", metrics)
        background.finish()
    assert names(tmp_path) == [f"step_{step:08d}" for step in kept]
    file = tmp_path / "best_checkpoint"
    assert (file.read_text() == f"step_0000000{named}\n") if named else not file.exists()


def test_room_is_not_made_of_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path, keep=3, best="max:accuracy")
    for step in (1, 2, 3):
        background = Saver(store, Holder(values(float(step))))
        background.begin(Progress(step, "shards"), {}, "run: {}\n", {"accuracy": 1 / step})
        background.finish()
    monkeypatch.setattr(stores.shutil, "disk_usage", lambda _: namedtuple("usage", "free")(0))
    with pytest.raises(NotSaved, match="Make room"):
        save(store, 4)
    assert names(tmp_path) == ["step_00000001", "step_00000003"]


@pytest.mark.parametrize("marker", ["", "{}", "null", "[1]", '{"a": 1}', '{"state.json": {}}', "\0\0\0", None])
def test_an_empty_or_foreign_marker_is_none(tmp_path: Path, marker: str | None) -> None:
    store = Store(tmp_path, keep=3)
    save(store, 1)
    second = save(store, 2)
    (second / "COMPLETE").unlink() if marker is None else (second / "COMPLETE").write_text(marker)
    assert marked(second) is None
    assert store.latest() == tmp_path / "checkpoints/step_00000001"
    with pytest.raises(UserError, match="step_00000002 is not a complete checkpoint"):
        verify(second)
    assert save(store, 2).name == "step_00000002"  # written again over the remains
    assert store.latest() == second
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


@pytest.mark.parametrize("damage", ["bit", "short", "gone", "marker"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    path = save(Store(tmp_path, keep=1), 1)
    victim = path / ("COMPLETE" if damage == "marker" else "optimizer.safetensors")
    data = bytearray(victim.read_bytes())
    if damage == "gone":
        victim.unlink()
    elif damage == "bit":
        data[-1] ^= 1
        victim.write_bytes(data)
    else:
        victim.write_bytes(data[:-3])
    with pytest.raises(UserError, match=victim.name):
        verify(path)


def test_shares_of_a_verification_are_all_of_it(tmp_path: Path) -> None:
    path = save(Store(tmp_path, keep=1), 1)
    (path / "config.yaml").write_text("run: {dir: other}\n")
    found = [one for share in range(3) if (one := damage(path, share, 3))]
    assert len(found) == 1
    assert "config.yaml is corrupt" in found[0]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a complete checkpoint nor a run directory"):
        find(tmp_path)


def test_a_checkpoint_that_another_rank_does_not_see_is_not_set_aside(tmp_path: Path) -> None:
    """Rank 0 judges for itself before it renames anything."""
    store = Store(tmp_path, keep=2)
    first, second = save(store, 1), save(store, 2)
    with pytest.raises(UserError, match=r"is missing\. Rank 0 reads it without a fault: .* that all nodes share"):
        resume._before(store, second, [f"{second} is missing."])
    assert store.complete() == [first, second]
    (second / "state.json").write_text("{}")
    assert resume._before(store, second, ["corrupt."]) == first
    assert names(tmp_path) == ["step_00000001", "step_00000002.damaged"]


@pytest.mark.parametrize(
    "parts", [[], [[0, 0, 5]], [[0, 1, 5]], [[0, 0, 3], [0, 2, 4]], [[1, 0, 6]], [[0, 0]], None, "x"]
)
def test_an_index_that_does_not_tell_of_all_elements_is_refused(tmp_path: Path, parts: Any) -> None:
    """Else they would be read as they lie in memory."""
    path = save(Store(tmp_path, keep=1), 1)
    index = json.loads((path / "index.json").read_text())
    assert index["parameters"]["a.weight"]["parts"] == [[0, 0, 6]]
    index["parameters"]["a.weight"]["parts"] = parts
    (path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json cannot be read"):
        Saved(path)


# -- layouts of before


def test_whole_files_of_before_are_read(tmp_path: Path) -> None:
    """As 0.1.0 wrote them: no index, buffers among the parameters."""
    path = tmp_path / "checkpoints/step_00000003"
    path.mkdir(parents=True)
    model = values(3.0)[VALUE] | {"running": torch.ones(2)}
    moments = {f"{kind}/{name}": x for kind in ("exp_avg", "exp_avg_sq") for name, x in values(3.0)[kind].items()}
    save_file(model, path / "model.safetensors")
    save_file(moments, path / "optimizer.safetensors")
    (path / "state.json").write_text(json.dumps({"step": 3, "data_fingerprint": "x", "updates": 3}))
    (path / "config.yaml").write_text("run: {}\n")
    rows = {p.name: {"bytes": p.stat().st_size, "crc32": files.checksum(p)} for p in path.iterdir()}
    (path / "COMPLETE").write_text(json.dumps(rows))
    verify(path)
    saved = Saved(find(tmp_path))
    assert saved.progress == Progress(3, "x", updates=3)
    assert saved.shapes == {name: tuple(x.shape) for name, x in model.items()}
    assert torch.equal(saved.read("a.weight", "exp_avg_sq", 2, 3), values(3.0)["exp_avg_sq"]["a.weight"].view(-1)[2:5])


# -- what cannot be saved


@pytest.mark.parametrize("place", ["model", "moments", "probe", "buffer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_never_replaces_a_checkpoint(tmp_path: Path, place: str, value: float) -> None:
    store = Store(tmp_path, keep=1)
    good = save(store, 1)
    wrong, state, probe, buffers = torch.tensor([0, value]), values(2.0), {"head": torch.ones(2)}, {"c": torch.ones(1)}
    {"model": state[VALUE], "moments": state["exp_avg_sq"], "probe": probe, "buffer": buffers}[place]["a.weight"] = (
        wrong
    )
    for kind in state:
        state[kind].setdefault("a.weight", torch.ones(2))
        state[kind]["a.weight"] = state[kind]["a.weight"].view(-1)[:2]
    with pytest.raises(
        UserError, match=r"step 2 is not saved: 1 of 2 values of .*a\.weight .*step_00000001 is untouched"
    ) as caught:
        save(store, 2, Holder(state, buffers=buffers), probe)
    assert not isinstance(caught.value, NotSaved)  # no disk is to blame
    assert names(tmp_path) == [good.name]
    verify(good)


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "The disk is full: make room"),
        (errno.EDQUOT, "The quota is used up"),
        (errno.EROFS, "The file system is read-only"),
        (errno.EACCES, "or the right to write there"),
        (errno.ENAMETOOLONG, "a shorter path"),
        (errno.ENOENT, "The folder has vanished"),
        (errno.ESTALE, "The folder was replaced"),
        (errno.EIO, "Input/output error"),
    ],
)
@pytest.mark.parametrize("place", ["write", "finish", "begin"])
def test_what_the_system_refuses_is_a_paragraph_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str, place: str
) -> None:
    store = Store(tmp_path, keep=1)
    good = save(store, 1)

    def fails(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number), str(tmp_path / "checkpoints/x"))

    places = {"write": (saver, "write_safetensors"), "finish": (stores, "write_text")}
    with monkeypatch.context() as patch:
        patch.setattr(*places.get(place, (stores.shutil, "disk_usage")), fails)
        with pytest.raises(NotSaved, match=rf"step 2 is not saved: cannot write \S*/checkpoints/x: .*{says}"):
            save(store, 2)
    assert store.latest() == good
    assert [name for name in names(tmp_path) if name.endswith(".partial")] == []
    verify(good)
    assert save(store, 3).name == "step_00000003"


def test_room_is_made_but_never_of_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path, keep=3, keep_every=100)
    for step in (100, 101, 102, 103):
        save(store, step)
    usage = namedtuple("usage", "free")
    before = [0, 10**6]  # room for one more after one has gone
    monkeypatch.setattr(stores.shutil, "disk_usage", lambda _: usage(before.pop(0) if before else 10**6))
    save(store, 104)
    assert "step_00000101 is removed: the disk has no room for one more" in caplog.text
    assert names(tmp_path) == [f"step_00000{n}" for n in (100, 102, 103, 104)]
    monkeypatch.setattr(stores.shutil, "disk_usage", lambda _: usage(0))
    with pytest.raises(
        NotSaved, match=r"a checkpoint takes 8\.5e-08 GB, and the disk of \S+ has 0 GB left\. Make room"
    ):
        save(store, 105)
    assert names(tmp_path) == ["step_00000100", "step_00000104"]


def test_a_file_that_rank_zero_does_not_see_is_named(tmp_path: Path) -> None:
    """No file system in common."""
    store = Store(tmp_path, keep=1)
    partial = store.begin(1, 10)
    (partial / "a").write_bytes(b"12")
    with pytest.raises(UserError, match=r"step_00000001\.partial/b is not there .* a file system that all nodes share"):
        store.finish(partial, {"a": files.Written(2, 0), "b": files.Written(2, 0)})
    assert store.latest() is None


# -- in the background


def test_steps_go_on_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is the state of the step that was saved, whatever the steps after it make of the tensors."""
    store, go, write = Store(tmp_path, keep=2), threading.Event(), saver.write_safetensors
    monkeypatch.setattr(saver, "write_safetensors", lambda *args: go.wait(20) and write(*args))
    holder = Holder(values(1.0))
    background = Saver(store, holder)
    background.begin(Progress(1, "shards"), {}, "run: {}\n")
    assert background.in_flight
    for tensors in holder.values.values():
        for tensor in tensors.values():
            tensor += 50
    assert background.poll() is None
    assert store.latest() is None
    go.set()
    path = background.finish()
    assert path == store.latest()
    assert path is not None
    assert torch.equal(Saved(path).whole("a.weight"), values(1.0)[VALUE]["a.weight"])
    assert background.finish() is None
    held = {name: tensor.data_ptr() for name, tensor in background._held.items()}
    background.begin(Progress(2, "shards"), {}, "run: {}\n")
    assert held == {name: tensor.data_ptr() for name, tensor in background._held.items()}  # no new memory
    path = background.finish()
    assert path is not None
    assert torch.equal(Saved(path).whole("a.weight"), values(51.0)[VALUE]["a.weight"])
