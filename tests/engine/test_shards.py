"""Engines hand out their own shards: every element of every tensor lies on the ranks that it should, and what is taken in is
what is handed out. Gathering and spreading is the checkpoint's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import small_config
from ranks import run_ranks
from steps import start, take_step

from lejepa_scale.checkpoint import gather, spread
from lejepa_scale.config import Config, validate
from lejepa_scale.errors import UserError
from lejepa_scale.parallel import process_group

ENGINES = ["ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3"]
Ranges = dict[tuple[str, str], tuple[int, int, int]]  # (name, kind) -> first, length, length of the whole


def _config(name: str, precision: str = "fp32") -> Config:
    engine: dict[str, Any] = {"name": name, "precision": precision}
    if name == "hsdp":
        engine |= {"name": "fsdp", "shard_degree": 2}
    return validate(small_config("unused", "unused", engine=engine, model={"options": {"depth": 1}}))


def _ranges(names: list[str]) -> dict[str, Ranges]:
    found = {}
    for name in names:
        engine, plan = start(_config(name, "bf16"))
        take_step(engine, plan, [[torch.randn(2, plan.micro_batch, 3, 32, 32)]])
        found[name] = {(s.name, s.kind): (s.start, len(s.data), torch.Size(s.shape).numel()) for s in engine.shards()}
        assert all(s.data.dtype == torch.float32 for s in engine.shards())
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_every_element_lies_somewhere_and_no_more_often_than_it_should(world: int) -> None:
    """Once under fsdp and zero, once a replica under HSDP (2 x 2), on every rank under ddp; in values and both moments."""
    names = ENGINES if world == 4 else [name for name in ENGINES if name != "hsdp"]
    of_ranks = run_ranks(_ranges, world, names)
    for name in names:
        copies = {"ddp": world, "hsdp": 2}.get(name, 1)
        first = of_ranks[0][name]
        assert [r[name].keys() for r in of_ranks] == [first.keys()] * world
        assert {kind for _, kind in first} == {"value", "exp_avg", "exp_avg_sq"}
        for key, (_, _, whole) in first.items():
            counts = torch.zeros(whole, dtype=torch.int)
            for ranges in of_ranks:
                begin, length, _ = ranges[name][key]
                assert not length or begin + length <= whole, (name, key)  # no padding
                counts[begin : begin + length] += 1
            assert counts.unique().tolist() == [copies], (name, key)


def _moved(names: list[str]) -> list[tuple[Any, float, Any]]:
    """A state that is taken from the first engine and given to each of the others: what comes back, and its next loss."""
    generator = torch.Generator().manual_seed(0)
    found = []
    state = None
    for name in names:
        engine, plan = start(_config(name), state=state)
        size = plan.micro_batch
        views = torch.randn(2, 16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        mine = views[:, process_group.rank() * size :][:, :size]
        if state is None and not found:
            take_step(engine, plan, [[mine]])
        state = gather(engine)
        result = take_step(engine, plan, [[mine]], 1)
        found.append((state, float(result.loss), gather(engine)))
        engine.close()
    del generator
    return found


def test_a_state_goes_from_engine_to_engine_unchanged() -> None:
    """Bit for bit, moments and counts too, in fp32 and after an update; the step that follows is the same to rounding."""
    names = ["single", "ddp", "fsdp", "zero1", "zero2", "zero3", "fsdp"]
    moved = run_ranks(_moved, 2, names[1:])[0]
    first, loss, after = moved[0]
    assert first.updates == 1
    assert after.updates == 2
    for name, (state, other_loss, other_after) in zip(names[2:], moved[1:], strict=True):
        assert state.updates == 1, name
        for kind, group in {"model": first.model, **first.moments}.items():
            theirs = state.model if kind == "model" else state.moments[kind]
            assert group.keys() == theirs.keys()
            assert all(torch.equal(group[key], theirs[key]) for key in group), (name, kind)
        assert other_loss == pytest.approx(loss, rel=1e-6), name
        assert other_after.updates == 2, name


def _refused() -> list[str]:
    """What every rank says of a state that is not the engine's."""
    engine, _ = start(_config("fsdp"))
    state = gather(engine)
    messages = []
    for change in ("missing", "shape"):
        if state is not None:
            name = sorted(state.model)[0]
            tensor = state.model.pop(name)
            if change == "shape":
                state.model[name] = tensor[:1]
        with pytest.raises(UserError) as refused:
            spread(state, engine)
        messages.append(str(refused.value))
        if state is not None:
            state.model[name] = tensor
    return messages


def test_a_state_of_another_model_is_refused_on_every_rank() -> None:
    first, second = run_ranks(_refused, 2)
    assert first == second
    assert "missing 1 (encoder.backbone.blocks.0.attn.proj.bias)" in first[0]
    assert "other shapes 1 (encoder.backbone.blocks.0.attn.proj.bias: (1,) instead of (128,))" in first[1]
