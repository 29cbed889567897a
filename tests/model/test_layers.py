"""Layers of an encoder, which learn at their own rates: timm's, with a classifier on top."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

from lejepa_scale.model import Encoder
from lejepa_scale.model.layers import layer_scales

ENCODERS = ["vit_tiny_patch16_224", "resnet18", "convnext_atto", "swin_tiny_patch4_window7_224", "mixer_s32_224"]
ENCODERS += [
    "deit_tiny_distilled_patch16_224",
    "eva02_tiny_patch14_224",
    "efficientnet_b0",
    "vit_base_patch16_siglip_224",
]


def of_timm(name: str, decay: float) -> dict[str, float]:
    with torch.device("meta"):
        model: Any = timm.create_model(name, num_classes=10)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = param_groups_layer_decay(model, layer_decay=decay)
    return {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}


@pytest.mark.parametrize("head_dim", [None, 7])
@pytest.mark.parametrize("name", ENCODERS)
def test_scales_are_timms_of_the_model_with_a_classifier(name: str, head_dim: int | None) -> None:
    with torch.device("meta"):
        encoder = Encoder(name, head_dim=head_dim)
    expected, found = of_timm(name, 0.7), layer_scales(encoder, 0.7)
    assert found.keys() == dict(encoder.named_parameters()).keys()
    assert found == {n: expected[n.removeprefix("backbone.")] for n in found}
    assert min(found.values()) < 0.7**4


def test_scales_of_a_vision_transformer_by_hand() -> None:
    """BEiT's: 1 for the head, decay for the last block and the norm after it, ..., decay^(depth + 1) for the embedding."""
    with torch.device("meta"):
        scales = layer_scales(Encoder("vit_nano"), 0.5)
    assert {
        n: scales[f"backbone.{n}"] for n in ("norm.weight", "cls_token", "pos_embed", "patch_embed.proj.weight")
    } == {
        "norm.weight": 0.5,
        "cls_token": 0.5**5,
        "pos_embed": 0.5**5,
        "patch_embed.proj.weight": 0.5**5,
    }
    assert [scales[f"backbone.blocks.{i}.mlp.fc1.bias"] for i in range(4)] == [0.5**4, 0.5**3, 0.5**2, 0.5]
