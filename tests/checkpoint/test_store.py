"""Checkpoints survive what happens to files: interruption, deletion, damage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lejepa_scale.checkpoint import CanonicalState, Progress, Store
from lejepa_scale.checkpoint.store import find, verify
from lejepa_scale.errors import UserError


def state(value: float) -> CanonicalState:
    def tensors() -> dict[str, torch.Tensor]:
        return {"a.weight": torch.full((3, 2), value), "b": torch.tensor(value)}

    return CanonicalState(tensors(), {"exp_avg": tensors(), "exp_avg_sq": tensors()}, updates=7)


def save(store: Store, step: int) -> Path:
    return store.save(state(float(step)), {"head": torch.ones(2)}, Progress(step, "shards", updates=7), "run: {}\n")


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=2)
    assert store.latest() is None
    loaded, probe, progress = store.load(save(store, 5))
    assert progress == Progress(5, "shards", updates=7)
    assert loaded.updates == 7
    assert torch.equal(loaded.model["a.weight"], torch.full((3, 2), 5.0))
    assert torch.equal(loaded.moments["exp_avg_sq"]["b"], torch.tensor(5.0))
    assert torch.equal(probe["head"], torch.ones(2))


def test_the_newest_are_kept_and_remains_are_cleared(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=2)
    (tmp_path / "checkpoints/step_00000003.partial").mkdir(parents=True)
    for step in (1, 2, 10):
        save(store, step)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000002", "step_00000010"]
    assert find(tmp_path).name == "step_00000010"
    assert find(tmp_path / "checkpoints/step_00000002").name == "step_00000002"


@pytest.mark.parametrize("place", ["model", "moments", "probe"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_never_replaces_a_checkpoint(tmp_path: Path, place: str, value: float) -> None:
    store = Store(tmp_path, keep=1)
    good = save(store, 1)
    bad, probe = state(2.0), {"head": torch.ones(2)}
    {"model": bad.model, "moments": bad.moments["exp_avg_sq"], "probe": probe}[place]["a.weight"] = torch.tensor(
        [0, value]
    )
    with pytest.raises(
        UserError, match=r"step 2 is not saved: 1 of 2 values of .*a\.weight .*step_00000001 is untouched"
    ):
        store.save(bad, probe, Progress(2, "shards"), "run: {}\n")
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [good.name]
    verify(good)


def test_a_checkpoint_that_is_not_finite_is_not_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as older versions wrote."""
    store, broken = Store(tmp_path, keep=3), state(torch.nan)
    with monkeypatch.context() as patch:
        patch.setattr("lejepa_scale.checkpoint.store.not_finite", lambda tensors: None)
        path = store.save(broken, {}, Progress(3, "shards"), "run: {}\n")
    with pytest.raises(UserError, match=r"step_00000003 cannot be gone on from: 6 of 6 values of a\.weight .*delete"):
        store.load(path)


def test_unmarked_checkpoints_do_not_count(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=3)
    save(store, 1)
    (save(store, 2) / "COMPLETE").unlink()
    assert store.latest() is not None
    assert store.latest().name == "step_00000001"  # type: ignore[union-attr]
    assert save(store, 2).name == "step_00000002"  # written again over the remains
    assert store.latest().name == "step_00000002"  # type: ignore[union-attr]


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


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a complete checkpoint nor a run directory"):
        find(tmp_path)
