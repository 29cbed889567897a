"""The packed forward against timm itself, value and gradient."""

from __future__ import annotations

import pytest
import timm
import torch

from lejepa_scale.errors import UserError
from lejepa_scale.model import Encoder
from lejepa_scale.model.attention import Packing, choose_backend

VITS = {
    "vit_nano": {},
    "vit_tiny_patch16_224": {"options": {"depth": 2}},
    "vit_small_patch14_reg4_dinov2": {"options": {"depth": 2, "init_values": 0.1}},
    "vit_giant_patch14_dinov2": {"options": {"depth": 1, "embed_dim": 96, "num_heads": 4}},  # SwiGLU
    "vit_medium_patch16_gap_240": {"options": {"depth": 2}},  # average pooling, no class token
}


@pytest.mark.parametrize("name", VITS)
def test_packed_equals_timm_per_resolution(name: str) -> None:
    encoder = Encoder(name, image_size=56, patch_size=14, **VITS[name]).double()
    assert encoder.packed
    plain = timm.create_model(**encoder.timm_arguments).double()
    plain.load_state_dict(encoder.backbone.state_dict())
    images = [torch.randn(3, 3, 56, 56, dtype=torch.float64), torch.randn(4, 3, 28, 42, dtype=torch.float64)]
    ours, theirs = encoder(images), [plain(x) for x in images]
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    for outputs in (ours, theirs):
        sum(out.square().sum() for out in outputs).backward()
    for (key, a), (_, b) in zip(encoder.backbone.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-7, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "vit_small_patch16_dinov3"])
def test_other_models_run_unpacked(name: str) -> None:
    encoder = Encoder(name, image_size=64, options={"depth": 1} if "vit" in name else {})
    assert not encoder.packed
    features = encoder([torch.randn(2, 3, 64, 64), torch.randn(3, 3, 32, 32)])
    assert [tuple(f.shape) for f in features] == [(2, encoder.embed_dim), (3, encoder.embed_dim)]
    assert encoder.patch_features(torch.randn(2, 3, 64, 64)).shape[-1] == encoder.embed_dim


def test_patch_features_are_the_tokens_in_their_place() -> None:
    encoder = Encoder("vit_nano", image_size=32).eval()
    image = torch.randn(1, 3, 32, 32)
    tokens = encoder.backbone.forward_features if False else encoder.patch_features(image)
    assert tokens.shape == (1, 4, 4, 128)


def test_stochastic_depth_drops_whole_sequences_and_keeps_the_mean() -> None:
    encoder = Encoder("vit_nano", image_size=32, drop_path=0.5)
    block = encoder.backbone.blocks[-1]
    packing = Packing(((300, 4), (500, 2)))
    ones = torch.ones(2200, 1)
    dropped = block._drop(ones, packing)
    for group in packing.split(dropped):
        assert ((group == 0) | (group == 2)).all()
        assert (group == group[:, :1]).all()
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.1)
    assert torch.equal(block.eval()._drop(ones, packing), ones)


@pytest.mark.parametrize("name", ["vit_nano", "resnet18"])  # packed, and timm's own
def test_activation_checkpointing_changes_no_gradient(name: str) -> None:
    torch.manual_seed(1)
    plain = Encoder(name, image_size=32)
    recomputed = Encoder(name, image_size=32, activation_checkpointing=True)
    recomputed.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 32, 32)
    for encoder in (plain, recomputed):
        encoder([image])[0].square().sum().backward()
    for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_unknown_names_and_impossible_sizes_are_refused() -> None:
    with pytest.raises(UserError, match=r"did you mean .*vit_small_patch16_224"):
        Encoder("vit_smal_patch16_224")
    with pytest.raises(UserError, match="timm refuses"):
        Encoder("vit_nano", options={"dept": 3})
    with torch.device("meta"):
        encoder = Encoder("vit_nano", image_size=32)
    with pytest.raises(UserError, match=r"30 px .* use 32 px"):
        encoder.check_sizes([32, 30])


def test_a_backend_that_cannot_run_here_is_refused_by_name() -> None:
    arguments = {"heads": 2, "head_dim": 8, "device": torch.device("cpu"), "dtype": torch.float32}
    assert choose_backend("auto", **arguments) == "sdpa"
    with pytest.raises(UserError, match="xformers: needs CUDA"):
        choose_backend("xformers", **arguments)
