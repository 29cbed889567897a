"""Small configurations of every kind of encoder, for the formulas of lejepa_scale/cost."""

from __future__ import annotations

from typing import Any

import torch
from conftest import small_config
from torch import Tensor

from lejepa_scale.config import BatchPlan, Config, validate

# (encoder, its options, image size); every kind of block that is packed, at least once
ENCODERS: dict[str, tuple[str, dict[str, Any], int]] = {
    "plain": ("vit_nano", {"depth": 2}, 32),
    "average pooling": ("vit_nano", {"depth": 2, "global_pool": "avg", "class_token": False}, 32),
    "attention pooling": ("vit_nano", {"depth": 2, "global_pool": "map", "class_token": False}, 32),
    "registers, layer scale, swiglu": (
        "vit_giant_patch14_dinov2",
        {"embed_dim": 48, "depth": 2, "num_heads": 3, "reg_tokens": 4},
        28,
    ),
    "post-norm": ("eva02_tiny_patch14_224", {"embed_dim": 48, "depth": 2, "num_heads": 3, "use_post_norm": True}, 28),
    "eva": ("eva02_tiny_patch14_224", {"embed_dim": 48, "depth": 2, "num_heads": 3}, 28),
    "dinov3": ("vit_small_patch16_dinov3", {"embed_dim": 48, "depth": 2, "num_heads": 3}, 32),
    "mixed rotary": ("vit_small_patch16_rope_mixed_224", {"embed_dim": 48, "depth": 2, "num_heads": 3}, 32),
    "grouped queries": (
        "eva02_tiny_patch14_224",
        {"embed_dim": 48, "depth": 2, "num_heads": 3, "attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1},
        28,
    ),
    "normalized inside": (
        "vit_nano",
        {"depth": 2, "qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
        32,
    ),
    "wide": ("vit_small_patch16_224", {"depth": 3}, 48),
    "one projection for queries, keys and values": (
        "eva_giant_patch14_224",
        {"embed_dim": 48, "depth": 2, "num_heads": 3},
        28,
    ),
}


def config_of(case: str, drop_path: float = 0.0, **sections: dict[str, Any]) -> Config:
    name, options, size = ENCODERS[case]
    views = {
        "global": {"count": 2, "size": 2 * size, "scale": [0.5, 1.0]},
        "local": {"count": 3, "size": size, "scale": [0.2, 0.5]},
    }
    model = {"encoder": name, "options": options, "drop_path": drop_path} | sections.pop("model", {})
    objective = {**sections.pop("objective", {})}
    if objective.get("regularizer", "sigreg") == "sigreg":  # torch's counter sees the reference's products
        objective["sigreg"] = {"backend": "reference"} | objective.get("sigreg", {})
    data = {"shards": "s", "views": views}
    return validate(small_config("r", "s", model=model, objective=objective, data=data, **sections))


def batch(config: Config, images: int) -> list[Tensor]:
    views = config.data.views
    return [torch.randn(g.count, images, 3, g.size, g.size) for g in (views.global_, views.local)]


def plan(images: int, accumulation: int = 1) -> BatchPlan:
    return BatchPlan(micro_batch=images, ranks=1, accumulation=accumulation)
