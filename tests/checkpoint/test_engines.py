"""A checkpoint of any engine on any number of ranks, read by every other: nothing is gathered, and no bit changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import mostly_slow, small_config
from ranks import run_ranks
from safetensors import safe_open
from steps import start, take_step

from lejepa_scale.checkpoint import Progress, Saved, Saver, Store, gather, saver
from lejepa_scale.checkpoint.saved import verify
from lejepa_scale.config import Config, validate
from lejepa_scale.errors import UserError
from lejepa_scale.parallel import collectives, process_group

BATCH = 16


def _config(name: str) -> Config:
    engine: dict[str, Any] = {"name": name}
    if name == "hsdp":
        engine |= {"name": "fsdp", "shard_degree": 2}
    model = {"options": {"depth": 2}, "projector": {"hidden": 65, "dim": 17}}
    return validate(small_config("unused", "unused", engine=engine, model=model, train={"global_batch": BATCH}))


def _views(step: int) -> torch.Tensor:
    return torch.randn(2, BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(step))


def _go_on(name: str, folder: str, first: int, steps: int, save: bool) -> tuple[Any, list[float]]:
    """`steps` steps from the checkpoint of step `first`, from the seed where that is 0: the state before them, on rank 0,
    and their losses."""
    store = Store(Path(folder), keep=99)
    saved = Saved(store.root / f"step_{first:08d}") if first else None
    engine, plan = start(_config(name), saved=saved)
    state = gather(engine)
    mine = slice(process_group.rank() * plan.micro_batch, (process_group.rank() + 1) * plan.micro_batch)
    losses = [
        float(take_step(engine, plan, [[_views(step)[:, mine]]], step).loss) for step in range(first, first + steps)
    ]
    if save:
        background = Saver(store, engine)
        background.begin(Progress(first + steps, "shards"), {}, "run: {}\n")
        background.finish()
    engine.close()
    return state, losses


CHAIN = [("fsdp", 2), ("zero3", 2), ("ddp", 1), ("hsdp", 4), ("zero1", 2), ("zero2", 2), ("ddp", 2)]


@pytest.mark.parametrize("links", mostly_slow([3, 7], 3))
def test_checkpoints_go_from_engine_to_engine(tmp_path: Path, links: int) -> None:
    """fsdp x 2 -> zero3 x 2 -> ddp x 1 -> HSDP 2 x 2 -> zero1 x 2 -> zero2 x 2 -> ddp x 2: losses are those of one rank all
    along to rounding, and what is read is what was written, bit for bit, moments too."""
    _, whole = run_ranks(_go_on, 1, "single", str(tmp_path / "whole"), 0, 2 * links, False)[0]
    losses: list[float] = []
    for number, (name, world) in enumerate(CHAIN[:links]):
        first = 2 * number
        state, found = run_ranks(_go_on, world, name, str(tmp_path), first, 2, True)[0]
        losses += found
        if first:
            saved = Saved(tmp_path / f"checkpoints/step_{first:08d}")
            assert saved.ranks == CHAIN[number - 1][1]
            assert state.updates == first
            for kind, tensors in {"value": state.model, **state.moments}.items():
                assert {*tensors} == {*(saved.shapes if kind == "value" else saved.parameters)}
                for key, tensor in tensors.items():
                    assert torch.equal(saved.whole(key, kind), tensor), (name, kind, key)
    assert losses == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(("name", "world"), [("fsdp", 2), ("hsdp", 4), ("zero3", 2), ("zero1", 2), ("ddp", 2)])
def test_every_rank_writes_its_share_once(tmp_path: Path, name: str, world: int) -> None:
    run_ranks(_go_on, world, name, str(tmp_path), 0, 1, True)
    path = tmp_path / "checkpoints/step_00000001"
    verify(path)
    sizes = [sum(f.stat().st_size for f in path.glob(f"*-{rank + 1:05d}-of-*.safetensors")) for rank in range(world)]
    assert min(sizes) > 0.6 * max(sizes)
    index = json.loads((path / "index.json").read_text())
    elements = sum(torch.Size(row["shape"]).numel() for row in index["parameters"].values())
    keys = [key for file in path.glob("*.safetensors") for key in safe_open(file, "pt").keys()]
    assert len(keys) == len(set(keys))
    assert sum(sizes) == pytest.approx(4 * 3 * elements, rel=0.05)
    if name == "ddp":  # whole tensors, which anything reads
        assert not [key for key in keys if "[" in key]


def _one_fails(folder: str, failing: int, place: str) -> list[str]:
    """What each rank says where one cannot write, and what is left."""
    engine, plan = start(_config("fsdp"))
    store = Store(Path(folder), keep=2)
    background = Saver(store, engine)
    background.begin(Progress(1, "shards"), {}, "run: {}\n")
    background.finish()
    take_step(engine, plan, [[_views(0)[:, : plan.micro_batch]]])
    if process_group.rank() == failing:
        if place == "write":
            saver.write_safetensors = _no_space  # type: ignore[assignment]
        else:
            next(shard for shard in engine.shards() if len(shard.data)).data[0] = torch.nan
    background.begin(Progress(2, "shards"), {}, "run: {}\n")
    with pytest.raises(UserError) as refused:
        background.finish()
    collectives.barrier()
    engine.close()
    return [str(refused.value), *sorted(p.name for p in store.root.iterdir())]


def _no_space(*_: Any) -> None:
    raise OSError(28, "No space left on device", "/there")


@pytest.mark.parametrize(("failing", "place"), [(0, "write"), (1, "write"), (1, "number")])
def test_what_one_rank_cannot_write_is_said_by_all(tmp_path: Path, failing: int, place: str) -> None:
    says = "cannot write /there: No space left on device" if place == "write" else "1 of "
    for message, *left in run_ranks(_one_fails, 2, str(tmp_path), failing, place):
        assert message.startswith(f"step 2 is not saved: {says}")
        assert left == ["step_00000001"]


def _damaged(folder: str) -> list[str]:
    """What every rank says of a checkpoint of another model, and of one that one rank cannot read."""
    said = []
    saved = Saved(Store(Path(folder), 9).root / "step_00000001")
    other = validate(small_config("unused", "unused", engine={"name": "fsdp"}, model={"options": {"depth": 1}}))
    for config in (other, _config("fsdp")):
        if config is not other and process_group.rank() == 1:
            saved.read = _unreadable  # type: ignore[method-assign, assignment]
        with pytest.raises(UserError) as refused:
            start(config, saved=saved)
        said.append(str(refused.value))
    return said


def _unreadable(*_: Any, **__: Any) -> None:
    raise UserError("the second rank's disk is gone")


def test_what_one_rank_cannot_read_is_said_by_all(tmp_path: Path) -> None:
    run_ranks(_go_on, 2, "fsdp", str(tmp_path), 0, 1, True)
    for model, disk in run_ranks(_damaged, 2, str(tmp_path)):
        assert "do not belong to this model" in model
        assert disk == "the second rank's disk is gone"
