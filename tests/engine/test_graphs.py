"""A compiled block is one graph, whatever the kernel, the recomputation, the engine and stochastic depth. No code is
generated: what the compiler is handed is counted."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from conftest import mostly_slow, small_config
from ranks import run_ranks
from steps import start, take_step
from torch.fx import GraphModule
from torch.nn.parallel import DistributedDataParallel

from lejepa_scale.config import validate
from lejepa_scale.errors import UserError
from lejepa_scale.model import attention

DEPTH = 2
pytestmark = pytest.mark.unchecked  # the compiler would trace the checks too


def _graphs(engine: str, kernel: str, recomputation: str, drop_path: float, **model: Any) -> tuple[int, int]:
    """Graphs of a first step, and those of the next two."""
    made = list[GraphModule]()
    torch._dynamo.reset()

    def count(graph: GraphModule, inputs: Any) -> Any:
        made.append(graph)
        return graph.forward

    compiler = torch.compile
    sections: dict[str, Any] = {
        "engine": {"name": engine, "compile": True, "activation_checkpointing": recomputation},
        "model": {"options": {"depth": DEPTH}, "drop_path": drop_path, "drop_path_uniform": drop_path > 0, **model},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda forward, **options: compiler(forward, backend=count, **options))
        patch.setattr(attention, "choose_backend", lambda *_, **__: kernel)
        patch.setattr("lejepa_scale.model.encoder.choose_backend", lambda *_, **__: kernel)
        small_buckets = partial(
            DistributedDataParallel, bucket_cap_mb=0.01
        )  # with borders inside a block, as a large one has
        patch.setattr("lejepa_scale.engine.ddp.DistributedDataParallel", small_buckets)
        built, plan = start(validate(small_config("unused", "unused", **sections)))
        counts = []
        for number in range(3):
            generator = torch.Generator().manual_seed(number)
            views = [torch.randn(v, plan.micro_batch, 3, s, s, generator=generator) for v, s in ((2, 32), (2, 16))]
            take_step(built, plan, [views], number, lambda_=0.1 / (number + 1))
            counts.append(len(made))
        built.close()
    return counts[0], counts[2] - counts[0]


def _all(engine: str) -> dict[tuple[str, float], tuple[int, int]]:
    cases = [(kind, drop_path) for kind in ("none", "selective", "full") for drop_path in (0.0, 0.5)]
    return {case: _graphs(engine, "sdpa", *case) for case in cases}


@pytest.mark.parametrize(
    ("engine", "ranks"),
    mostly_slow([("single", 1), ("ddp", 2), ("fsdp", 2), ("zero1", 2), ("zero3", 2)], ("single", 1), ("fsdp", 2)),
)
def test_every_block_is_one_graph(engine: str, ranks: int) -> None:
    """The same one, whatever is recomputed and left out, and none more at later steps."""
    for found in run_ranks(_all, ranks, engine):
        assert found == dict.fromkeys(found, (1, 0))
        assert len(found) == 6


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("encoder", ["vit_nano", "vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"])
def test_so_is_a_block_without_some_patches(encoder: str, drop_path: float) -> None:
    model = {"encoder": encoder, "patch_size": 8, "patch_drop": {"global": 0.5, "local": 0.5}}
    assert _graphs("single", "sdpa", "none", drop_path, **model) == (1, 0)


def test_what_the_compiler_cannot_see_through_is_counted() -> None:
    """xformers breaks a block apart: the counter tells."""
    attention.BACKENDS["opaque"] = torch.compiler.disable(attention.sdpa)  # what xformers is to the compiler
    try:
        assert _graphs("single", "opaque", "none", 0.0)[0] > DEPTH
        assert _graphs("single", "opaque", "full", 0.0)[0] == 0  # the whole block runs as it is, without a word
    finally:
        del attention.BACKENDS["opaque"]
    with pytest.raises(UserError, match=r"engine\.compile=true cannot look into xformers.*model\.attention=varlen"):
        validate(small_config("r", "s", engine={"compile": True}, model={"attention": "xformers"}))
