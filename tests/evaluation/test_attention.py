"""The attention of the class token against timm's own steps and a computation by hand."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lejepa_scale.evaluation.pictures.attention import NoAttention, class_attention

SMALL = {"depth": 2, "num_classes": 0, "dynamic_img_size": True}
REGISTERS = ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "embed_dim": 48, "num_heads": 3})
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_tiny_patch16_224", {"img_size": 64, "embed_dim": 48, "num_heads": 3}),
    "registers": REGISTERS,
    "normalized": (
        "vit_tiny_patch16_224",
        {"img_size": 64, "embed_dim": 48, "num_heads": 3, "qk_norm": True},
    ),
    "rotary": ("vit_small_patch16_dinov3", {"img_size": 64, "embed_dim": 48, "num_heads": 3}),
    "eva": ("eva02_tiny_patch14_224", {"img_size": 56, "embed_dim": 48, "num_heads": 3}),
    "distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 64, "embed_dim": 48, "num_heads": 3}),
}


def built(name: str, options: dict[str, Any]) -> Any:
    model = timm.create_model(name, pretrained=False, **{**SMALL, **options}).eval()
    for parameter in model.parameters():  # attention that differs by place, layer scale that does something
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_that_of_timms_explicit_steps(kind: str, fused: bool) -> None:
    """timm without the fused kernel hands its weights to a dropout, where they are read; images are not square."""
    name, options = MODELS[kind]
    model, side = built(name, options), options["img_size"]
    images = torch.randn(2, 3, side, side + 2 * model.patch_embed.patch_size[1])
    attn, seen = model.blocks[-1].attn, list[Tensor]()
    handle = attn.attn_drop.register_forward_hook(lambda *given: seen.append(given[2]))
    attn.fused_attn = False
    with torch.no_grad():
        model.forward_features(images)
    handle.remove()
    attn.fused_attn = fused
    found = class_attention(model, images)
    (expected,) = seen
    torch.testing.assert_close(expected.sum(-1), torch.ones(expected.shape[:-1]))
    rows, columns = model.patch_embed.dynamic_feat_size(images.shape[-2:])
    assert found.patches.shape == (2, 3, rows, columns)
    assert found.prefix.shape == (2, 3, model.num_prefix_tokens)
    together = torch.cat([found.prefix, found.patches.flatten(2)], -1)
    torch.testing.assert_close(together, expected[:, :, 0], rtol=1e-4, atol=1e-6)
    assert float(together.std()) > 1e-4


def test_attention_by_hand_gives_what_the_module_gives() -> None:
    """softmax(q k^T / sqrt(d)), times v, through the last projection: timm's result, with registers."""
    name, options = REGISTERS
    model, images = built(name, options), torch.randn(2, 3, 56, 84)
    attn, given = model.blocks[-1].attn, list[tuple[Tensor, Tensor]]()
    attn.register_forward_hook(lambda _, args, out: given.append((args[0], out)))
    found = class_attention(model, images)
    x, out = given[0]
    with torch.no_grad():
        q, k, v = F.linear(x, attn.qkv.weight, attn.qkv.bias).view(2, -1, 3, 3, 16).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / 16**0.5).exp()
        weights = weights / weights.sum(-1, keepdim=True)
        joined = (weights @ v).transpose(1, 2).flatten(2) @ attn.proj.weight.T + attn.proj.bias
    torch.testing.assert_close(joined, out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.patches, weights[:, :, 0, 5:].view(2, 3, 4, 6), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.prefix, weights[:, :, 0, :5], rtol=1e-4, atol=1e-6)
    total = found.prefix.sum(-1) + found.patches.sum((-2, -1))
    torch.testing.assert_close(total, torch.ones(2, 3))


def test_biases_of_attention_count() -> None:
    """BEiT adds a bias for every pair of places: its mask."""
    model = timm.create_model(
        "beit_base_patch16_224", depth=2, num_classes=0, img_size=64, embed_dim=48, num_heads=3
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    attn, seen, images = model.blocks[-1].attn, list[Tensor](), torch.randn(1, 3, 64, 64)
    attn.attn_drop.register_forward_hook(lambda *given: seen.append(given[2]))
    fused = class_attention(model, images)
    attn.fused_attn = False
    with torch.no_grad():
        model.forward_features(images)
    torch.testing.assert_close(fused.patches.flatten(2), seen[0][:, :, 0, 1:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet10t", {}),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg", "img_size": 64, "depth": 1}),
        ("vit_base_patch16_siglip_224", {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 3}),
        ("vit_tiny_patch16_224", {"class_token": False, "reg_tokens": 2, "global_pool": "avg", "img_size": 64}),
    ],
)
def test_without_a_class_token_there_is_none(name: str, options: dict[str, Any]) -> None:
    model = timm.create_model(name, pretrained=False, num_classes=0, **options).eval()
    with pytest.raises(NoAttention, match="no class token"):
        class_attention(model, torch.randn(1, 3, *[options.get("img_size", 64)] * 2))


class _Causal(nn.Module):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        x = x[:, None]
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)[:, 0]


class _Twice(nn.Module):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        x = x[:, None]
        return (F.scaled_dot_product_attention(x, x, x) - F.scaled_dot_product_attention(x, x, 2 * x))[:, 0]


class _None(nn.Module):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return x.cumsum(1)


@pytest.mark.parametrize(
    ("attention", "why"),
    [
        (_Causal(), "do not give its result"),
        (_Twice(), "none that is understood"),
        (_None(), "none that is understood"),
    ],
)
def test_attention_that_is_not_understood_is_not_drawn(attention: nn.Module, why: str) -> None:
    model = built(*MODELS["plain"])
    model.blocks[-1].attn = attention
    with pytest.raises(NoAttention, match=why):
        class_attention(model, torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("name", ["cait_xxs24_224", "xcit_nano_12_p16_224"])
def test_attention_between_other_things_is_not_drawn(name: str) -> None:
    """A class token that joins late; attention between channels."""
    model = timm.create_model(name, pretrained=False, num_classes=0, depth=1).eval()
    with pytest.raises(NoAttention):
        class_attention(model, torch.randn(1, 3, 224, 224))
