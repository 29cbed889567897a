"""Defaults against LeJEPA's paper (arXiv 2511.08544), the transforms that it names, and this project's documentation: a
changed default is a changed experiment."""

from __future__ import annotations

from typing import Any

import pytest
import timm
from conftest import small_config  # configuration keys: all of those in DEFAULTS

from lejepa_scale.config import validate
from lejepa_scale.errors import UserError
from lejepa_scale.model import Encoder

# SIGReg's keys are in a table of their own, since they have moved once.
DEFAULTS: dict[str, Any] = {
    "objective.regularizer": "sigreg",
    "objective.lambda_": 0.05,
    "objective.weighting": "convex",
    "objective.prediction": "mean",
    "optim.lr": 5e-4,
    "optim.final_lr_ratio": 1e-3,
    "optim.warmup_steps": 0,
    "optim.warmup_start_ratio": None,
    "optim.weight_decay": 0.05,
    "optim.betas": (0.9, 0.95),
    "optim.eps": 1e-8,
    "optim.clip_norm": None,
    "data.views.global_.count": 2,
    "data.views.global_.size": 224,
    "data.views.global_.scale": (0.3, 1.0),
    "data.views.local.count": 6,
    "data.views.local.size": 98,
    "data.views.local.scale": (0.05, 0.3),
    "data.channels": 3,
    "data.mean": timm.data.IMAGENET_DEFAULT_MEAN,
    "data.std": timm.data.IMAGENET_DEFAULT_STD,
    "data.augment.flip": 0.5,
    "data.augment.jitter": 0.8,
    "data.augment.brightness": 0.4,
    "data.augment.contrast": 0.4,
    "data.augment.saturation": 0.2,
    "data.augment.hue": 0.1,
    "data.augment.grayscale": 0.2,
    "data.augment.blur": 0.5,
    "data.augment.solarize": 0.2,
    "data.shuffle_block": 16384,
    "data.max_pixels": 80_000_000,
    "data.max_faults": 16,
    "data.read_timeout": 30.0,
    "data.retries": 5,
    "train.max_nonfinite": 20,
    "engine.precision": "bf16",
    "engine.timeout_minutes": 10,
    "model.projector.hidden": 2048,
    "model.projector.layers": 3,
    "model.projector.dim": 64,
    "model.projector.activation": "gelu",
    "model.head_dim": None,
    "model.predictor": None,
    "model.drop_path": 0.0,
    "model.patch_drop.global_": 0.0,
    "model.patch_drop.local": 0.0,
    "checkpoint.every": 1000,
    "checkpoint.keep": 2,
    "log.every": 10,
    "probe.enabled": True,
    "probe.lr": 1e-3,
    "run.seed": 0,
}
SIGREG = {"num_slices": 1024, "knots": 17, "t_max": 3.0, "estimator": "v", "scale": "n", "reference_n": 256}
SMALLEST = {
    "run": {"dir": "r"},
    "train": {"steps": 10, "global_batch": 2},
    "data": {"shards": "s"},
    "model": {"encoder": "vit_nano"},
}


def value(node: Any, path: str) -> Any:
    for name in path.split("."):
        node = getattr(node, name)
    return node


@pytest.mark.parametrize("path", DEFAULTS)
def test_defaults(path: str) -> None:
    assert value(validate(SMALLEST), path) == DEFAULTS[path]


@pytest.mark.parametrize("key", SIGREG)
def test_defaults_of_sigreg(key: str) -> None:
    objective = validate(SMALLEST).objective
    assert getattr(getattr(objective, "sigreg", objective), key) == SIGREG[key]


@pytest.mark.parametrize(("name", "width", "depth", "heads"), [("vit_nano", 128, 4, 4), ("vit_micro", 192, 6, 3)])
def test_our_sizes(name: str, width: int, depth: int, heads: int) -> None:
    """Parameters of a vision transformer by hand: patches of 8, MLP of 4, a class token, positions, biases, norms."""
    encoder = Encoder(name, image_size=64)
    block = 4 * width * width + 4 * width + 2 * 4 * width * width + 5 * width + 4 * width
    around = (3 * 8 * 8 + 1) * width + width + (8 * 8 + 1) * width + 2 * width
    assert sum(p.numel() for p in encoder.parameters()) == depth * block + around
    assert [(b.attn.num_heads, b.attn.head_dim) for b in encoder.blocks] == [(heads, width // heads)] * depth  # type: ignore[union-attr]


@pytest.mark.parametrize(("retries", "timeout", "minutes"), [(5, 30.0, 9), (0, 60.0, 2), (3, 100.0, 15)])
def test_a_rank_is_waited_for_as_long_as_it_may_retry(retries: int, timeout: float, minutes: int) -> None:
    """Two requests may wait for every attempt, and pauses are of 30 seconds at most: 5 x 30 + 12 x 30 s = 8.5 minutes."""
    longest = (30 * retries + 2 * (retries + 1) * timeout) / 60
    assert minutes - 1 < longest <= minutes
    data = {"shards": "https://host/s.tar", "retries": retries, "read_timeout": timeout}
    assert (
        validate({**SMALLEST, "data": data, "engine": {"timeout_minutes": minutes}}).engine.timeout_minutes == minutes
    )
    if minutes - 1 > 0:
        with pytest.raises(UserError, match=f"{longest:.1f} minutes"):
            validate({**small_config("r", "s"), "data": data, "engine": {"timeout_minutes": minutes - 1}})
