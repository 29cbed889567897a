"""How engines get their first weights: none can be forgotten without a sign, and no rank but the first draws them all. What
of an engine's settings shows in no result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import small_config
from ranks import run_ranks
from steps import start, take_step
from torch.distributed.fsdp import CPUOffloadPolicy

from lejepa_scale.checkpoint import spread
from lejepa_scale.config import Config, check_world, validate
from lejepa_scale.engine import build_engine
from lejepa_scale.engine.zero import deepspeed_config
from lejepa_scale.errors import UserError
from lejepa_scale.model import LeJEPA, build
from lejepa_scale.parallel import process_group
from lejepa_scale.training.start import initial_state

ENGINES = ["ddp", "fsdp", "zero1", "zero3"]
FORGOTTEN = "encoder.backbone.blocks.1.mlp.fc2.weight"


def _config(name: str, **model: Any) -> Config:
    engine = {"name": name, "precision": "bf16"}
    return validate(small_config("unused", "unused", engine=engine, model={"options": {"depth": 2}, **model}))


def _forgetful(names: list[str]) -> list[list[bool]]:
    """Whether the loss is finite, for each engine whole and with one weight that nobody loads."""
    found = []
    for name in names:
        config, finite = _config(name), []
        for forgotten in ("", FORGOTTEN):
            plan = check_world(config, 2)
            engine = build_engine(config, plan, lambda c=config: build(c), torch.device("cpu"))
            take = engine.take
            engine.take = lambda shard, take=take, name=forgotten: (  # type: ignore[method-assign]
                None if shard.name == name else take(shard)
            )
            state = initial_state(0, lambda c=config: build(c)) if process_group.rank() == 0 else None
            spread(state, engine)
            result = take_step(engine, plan, [[torch.randn(2, 8, 3, 32, 32)]])
            finite.append(bool(torch.isfinite(result.loss)))
        found.append(finite)
    return found


def test_a_weight_that_nobody_loads_shows_in_the_first_loss() -> None:
    assert run_ranks(_forgetful, 2, ENGINES)[0] == [[True, False]] * len(ENGINES)


def _precisions(names: list[str]) -> list[list[tuple[str, ...]]]:
    """For each engine, fp32 and bf16: of what a block is given, a linear layer multiplies, and the update is made."""
    found = []
    for name in names:
        of_engine = []
        for precision in ("fp32", "bf16"):
            seen = list[str]()
            tree = small_config(
                "u", "u", engine={"name": name, "precision": precision}, model={"options": {"depth": 2}}
            )
            engine, plan = start(validate(tree))
            block = engine.module.encoder.blocks[1]
            block.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(str(given[0].dtype)))
            block.mlp.fc1.register_forward_pre_hook(  # type: ignore[union-attr, operator]
                lambda layer, given, seen=seen: seen.extend((str(given[0].dtype), str(layer.weight.dtype)))
            )
            take_step(engine, plan, [[torch.randn(2, plan.micro_batch, 3, 32, 32)]])
            seen += {str(shard.data.dtype) for shard in engine.shards()}
            of_engine.append(tuple(seen))
        found.append(of_engine)
    return found


def test_every_engine_computes_in_the_precision_that_it_is_told() -> None:
    fp32, bf16 = "torch.float32", "torch.bfloat16"
    for name, found in zip(ENGINES, run_ranks(_precisions, 2, ENGINES)[0], strict=True):
        assert found == [(fp32,) * 4, (bf16, bf16, bf16, fp32)], name


def test_a_rank_without_a_group_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of training alone what should be averaged."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"rank 1 of 2 .* no process group was joined"):
        process_group.join_alone()
    monkeypatch.setenv("WORLD_SIZE", "1")
    process_group.join_alone()
    assert torch.distributed.get_world_size() == 1


def _hybrid(names: list[str]) -> list[float]:
    """The loss after one step on the same images, for each engine."""
    found = []
    for name in names:
        tree = small_config("u", "u", train={"global_batch": 4}, engine={"name": name, "precision": "fp32"})
        tree["model"] |= {"encoder": "vit_tiny_r_s16_p8_224", "options": {"depth": 1}}
        tree["data"]["views"] = {"global": {"count": 2, "size": 64}, "local": {"count": 0}}
        engine, plan = start(validate(tree))
        images = torch.randn(2, 4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        mine = images[:, plan.micro_batch * process_group.rank() :][:, : plan.micro_batch]
        losses = [float(take_step(engine, plan, [[mine]], number).loss) for number in (0, 1)]
        engine.close()
        found.append(losses[1])
    return found


def test_a_constructor_that_computes_with_its_weights() -> None:
    """timm's hybrids pass an image through their network to learn its stride, which cannot be done without weights."""
    (one,) = run_ranks(_hybrid, 1, ["single"])[0]
    assert run_ranks(_hybrid, 2, ENGINES)[0] == pytest.approx([one] * len(ENGINES), rel=1e-5)


def _kernels() -> object:
    import deepspeed

    start(_config("zero1"))
    return deepspeed.comm.comm.cdb.shm_comm_op


def test_zero_builds_no_kernels_that_nothing_calls() -> None:
    """DeepSpeed's own, for inference on CPUs: half a minute of compiling at a start."""
    assert run_ranks(_kernels, 1) == [None]


def _drawn(names: list[str]) -> list[int]:
    """How many modules with weights in them were built here, for each engine."""
    counts = []
    for name in names:
        config, real = _config(name), []

        def factory(c: Config = config, real: list[bool] = real) -> LeJEPA:
            module = build(c)
            # ZeRO-3 empties what it has cut
            real.append(sum(p.numel() for p in module.parameters() if not p.is_meta) > 1000)
            return module

        start(config, factory=factory)
        counts.append(sum(real))
    return counts


def test_only_the_first_rank_draws_a_whole_model() -> None:
    assert run_ranks(_drawn, 2, ["ddp", "fsdp", "zero3"]) == [[1, 1, 1], [0, 0, 0]]


def _rotary_precision() -> set[torch.dtype]:
    """Of the sines and cosines that blocks get under FSDP in bf16."""
    options = {"depth": 2, "embed_dim": 96, "num_heads": 4}
    config = _config("fsdp", encoder="vit_small_patch16_dinov3", options=options)
    engine, plan = start(config)
    seen = set()
    for block in engine.module.encoder.blocks:
        inner = block.attn.forward
        block.attn.forward = lambda x, row, inner=inner: (seen.update((x.dtype, row.rope[0].dtype)), inner(x, row))[1]
    take_step(engine, plan, [[torch.randn(2, 8, 3, 32, 32)]])
    return seen


def test_rotary_positions_stay_in_fp32() -> None:
    assert run_ranks(_rotary_precision, 2)[0] == {torch.bfloat16, torch.float32}


def _fsdp_settings() -> list[tuple[int, int, bool]]:
    """Units fetched ahead of the first and of the last block, and whether shards lie on the host, for each configuration."""
    found = []
    for prefetch, offload in ((0, False), (1, False), (2, True)):
        engine = {"name": "fsdp", "prefetch": prefetch, "cpu_offload": offload}
        config = validate(small_config("unused", "unused", engine=engine, model={"options": {"depth": 4}}))
        built, _ = start(config)
        first, *_, last = (block._get_fsdp_state() for block in built.module.encoder.blocks)
        group = first._fsdp_param_groups[0] if hasattr(first, "_fsdp_param_groups") else first._fsdp_param_group
        ahead = len(first._states_to_forward_prefetch), len(last._states_to_backward_prefetch)
        found.append((*ahead, isinstance(group.offload_policy, CPUOffloadPolicy)))
    return found


def test_fsdp_fetches_ahead_and_offloads_as_asked() -> None:
    assert run_ranks(_fsdp_settings, 2)[0] == [(0, 0, False), (1, 1, False), (2, 2, True)]


def test_deepspeed_is_told_the_size_of_a_block() -> None:
    engine = {"name": "zero3", "prefetch": 2, "cpu_offload": True}
    config = validate(small_config("unused", "unused", engine=engine, model={"options": {"depth": 4}}))
    with torch.device("meta"):
        module = build(config)
    settings = deepspeed_config(config, check_world(config, 2), module)["zero_optimization"]
    block = sum(p.numel() for p in module.encoder.blocks[0].parameters())
    rest = sum(p.numel() for p in module.parameters()) - 4 * block
    assert settings["stage3_prefetch_bucket_size"] == settings["reduce_bucket_size"] == 2 * block
    assert 3 * block <= settings["stage3_max_live_parameters"] < 3.1 * block + 2 * rest
    assert settings["offload_optimizer"]["device"] == settings["offload_param"]["device"] == "cpu"
