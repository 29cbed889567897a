"""Buffers are the same under every engine, bit for bit: what a module computes for itself, such as the tables of rotary
positions, is no matter of the engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import mostly_slow, small_config
from ranks import run_ranks
from steps import start, take_step
from torch import Tensor

from lejepa_scale.config import Config, validate
from lejepa_scale.model import build

ENGINES = ["ddp", "fsdp", "zero1", "zero2", "zero3"]
FAMILIES: dict[str, dict[str, Any]] = {
    "eva02_tiny_patch14_224": {"patch_size": 16, "options": {"depth": 1}},
    "vit_small_patch16_rope_224": {"options": {"depth": 1}},
    "vit_small_patch16_dinov3": {"options": {"depth": 1}},
    "vit_medium_patch16_rope_reg1_gap_256": {"options": {"depth": 1}},
    "swin_tiny_patch4_window7_224": {"options": {"img_size": 32, "depths": [1, 1], "window_size": 4}},
    "resnet10t": {},
}


def _config(engine: str, family: str) -> Config:
    views = {"global": {"count": 2, "size": 32, "scale": [0.3, 1.0]}, "local": {"count": 0}}
    tree = small_config("unused", "unused", engine={"name": engine, "precision": "bf16"})
    tree["model"] = {"encoder": family, "projector": {"hidden": 24, "dim": 8}, **FAMILIES[family]}
    tree["data"]["views"] = views
    return validate(tree)


def _held(family: str) -> list[dict[str, Tensor]]:
    """Of every engine, before and after a step."""
    found = []
    for name in ENGINES:
        engine, plan = start(_config(name, family))
        found.append({n: b.clone() for n, b in engine.module.named_buffers()})
        take_step(engine, plan, [[torch.randn(2, plan.micro_batch, 3, 32, 32)]])
        persistent = engine.buffers()
        found.append({n: b.clone() for n, b in engine.module.named_buffers() if n not in persistent})
        engine.close()
    return found


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "vit_small_patch16_dinov3", "resnet10t"))
def test_every_engine_holds_the_same(family: str) -> None:
    expected = dict(build(_config("single", family)).named_buffers())
    assert expected
    for of_rank in run_ranks(_held, 2, family):
        for before, after in zip(of_rank[::2], of_rank[1::2], strict=True):
            assert before.keys() == expected.keys()
            for buffers in (before, after):
                for name, buffer in buffers.items():
                    assert buffer.dtype == expected[name].dtype, name
                    assert torch.equal(buffer, expected[name]), name
