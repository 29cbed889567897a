"""Token dropping against timm's own models run on the patches that stay, and against timm's PatchDropout; which ones stay is
drawn fairly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from scipy import stats
from timm.layers import PatchDropout
from torch import Tensor

from lejepa_scale.errors import UserError
from lejepa_scale.model import Encoder, dropping, packed
from lejepa_scale.model.attention import Packing

NARROW = {"depth": 2, "embed_dim": 96, "num_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "vit_nano": {"depth": 2},
    "vit_small_patch14_reg4_dinov2": {"depth": 2, "init_values": 0.1},  # registers without positions
    "vit_medium_patch16_gap_240": {"depth": 2},  # mean of the patches, no class token
    "vit_so400m_patch14_siglip_224": NARROW,  # attention pooling
    "vit_large_patch14_clip_224": NARROW,  # normalized before the blocks
    "eva_giant_patch14_224": NARROW,
    "eva02_tiny_patch14_224": {"depth": 2},  # a table and rotary positions
    "eva02_enormous_patch14_clip_224": NARROW,  # post-norm
    "vit_small_patch16_dinov3": {"depth": 2},
    "vit_small_patch16_rope_mixed_224": {"depth": 2},  # learned angles of each block and head
    "vit_medium_patch16_rope_reg1_gap_256": {"depth": 2},
    "vit_base_patch16_sapiens2": NARROW | {"num_kv_heads": (4, 2)},
}


def sizes(encoder: Encoder, shares: tuple[float, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Images of 64 and of 32 x 48 px in patches of 16, and the places of their tokens that stay, drawn as the encoder will
    at this seed."""
    images = [torch.randn(2, 3, 64, 64), torch.randn(3, 3, 32, 48)]
    dtype = next(encoder.parameters()).dtype
    torch.manual_seed(7)
    prefix, places = encoder.backbone.num_prefix_tokens, []
    for n, patches, share in ((2, 16, shares[0]), (3, 6, shares[1])):
        whole = torch.arange(prefix + patches).expand(n, -1)
        places.append(dropping.draw(n, patches, prefix, share, torch.device("cpu")) if share else whole)
    torch.manual_seed(7)
    return [x.to(dtype) for x in images], places


def on_kept(plain: Any, images: Tensor, places: Tensor) -> Tensor:
    """timm's model on some of its tokens: its own embedding, blocks, normalization and pooling, image by image."""
    out = []
    for image, of_image in zip(images, places, strict=True):
        embedded = plain._pos_embed(plain.patch_embed(image[None]))
        tokens, rope = embedded if isinstance(embedded, tuple) else (embedded, None)
        tokens = plain.norm_pre(tokens[:, of_image])
        if rope is not None:  # [..., places of patches, 2 D]
            rope = rope[..., of_image[plain.num_prefix_tokens :] - plain.num_prefix_tokens, :]
        for i, block in enumerate(plain.blocks):
            own = () if rope is None else (rope[i] if getattr(plain, "rope_mixed", False) else rope,)
            tokens = block(tokens, *own)
        out.append(plain.forward_head(plain.norm(tokens)))
    return torch.cat(out)


def pair(name: str, head_dim: int | None = None, **arguments: Any) -> tuple[Encoder, Any]:
    options = FAMILIES[name]
    encoder = Encoder(name, image_size=64, patch_size=16, head_dim=head_dim, options=options, **arguments).double()
    plain = timm.create_model(**encoder.timm_arguments).double().eval()
    plain.load_state_dict(encoder.backbone.state_dict())
    if getattr(encoder.backbone, "rope", None) is not None:
        encoder.backbone.rope.eval()  # some are jittered in training
    return encoder, plain


@pytest.mark.parametrize("shares", [(0.3, 0.5), (0.5, 0.0), (0.0, 0.5)], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_blocks_see_the_patches_that_stay(name: str, shares: tuple[float, float]) -> None:
    """Value and every parameter's gradient."""
    encoder, plain = pair(name, patch_drop=shares, head_dim=7 if shares[1] else None)
    encoder.train()
    if getattr(encoder.backbone, "rope", None) is not None:
        encoder.backbone.rope.eval()
    images, places = sizes(encoder, shares)
    ours = encoder(images)
    theirs = [on_kept(plain, x, of_group) for x, of_group in zip(images, places, strict=True)]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)  # positions are resampled in fp32
    for outputs in (ours, theirs):
        sum(out.square().sum() for out in outputs).backward()
    for (key, a), (_, b) in zip(encoder.backbone.named_parameters(), plain.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7, msg=key)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("patches", [1, 2, 10, 49, 100, 196])
def test_as_many_stay_as_timm_keeps(patches: int, share: float) -> None:
    tokens = torch.randn(2, 3 + patches, 4)
    theirs = PatchDropout(share, num_prefix_tokens=3)(tokens)
    places = dropping.draw(2, patches, 3, share, tokens.device)
    found = dropping.take(tokens, places)
    assert found.shape == theirs.shape == (2, 3 + dropping.staying(patches, share), 4)
    assert torch.equal(found[:, :3], tokens[:, :3])
    assert all(len(set(of_sequence.tolist())) == found.shape[1] for of_sequence in places)
    expected = torch.stack([own[of_sequence] for own, of_sequence in zip(tokens, places, strict=True)])
    assert torch.equal(found, expected)


def test_every_patch_and_every_pair_of_patches_has_the_same_chance() -> None:
    """Chi-square over 20,000 sequences of 12 patches of which 5 stay. Counts of a draw without replacement vary less than
    multinomial ones, by (n - k) / (n - 1) for one patch; subsets of two are compared in whole: all C(12, 5) as likely."""
    n, k, draws = 12, 5, 20_000
    places = dropping.draw(draws, n, 1, 1 - (k + 0.5) / n, torch.device("cpu"))[:, 1:] - 1
    assert places.shape == (draws, k)
    counts = torch.bincount(places.flatten(), minlength=n).numpy()
    statistic = ((counts - draws * k / n) ** 2 / (draws * k / n)).sum() * (n - 1) / (n - k)
    assert 1e-3 < stats.chi2.sf(statistic, n - 1) < 1 - 1e-3
    subsets = (2 ** places.numpy()).sum(1)
    _, of_subset = np.unique(subsets, return_counts=True)
    assert len(of_subset) == 792  # 12 choose 5
    assert stats.chisquare(of_subset).pvalue > 1e-3
    neighbours = (subsets[1:] == subsets[:-1]).sum()  # sequences draw for themselves
    assert stats.binomtest(int(neighbours), draws - 1, 1 / 792).pvalue > 1e-3


def test_only_what_stays_moves_pixels_and_positions() -> None:
    """One image: the gradient is zero at the pixels and the positions of every patch that is left out, and nowhere else."""
    encoder = Encoder("vit_nano", image_size=64, options={"depth": 1}, patch_drop=(0.6,)).train()
    image = torch.randn(1, 3, 64, 64, requires_grad=True)
    torch.manual_seed(3)
    places = dropping.draw(1, 64, 1, 0.6, torch.device("cpu"))[0]
    torch.manual_seed(3)
    encoder([image])[0].square().sum().backward()
    moved = encoder.backbone.pos_embed.grad[0].abs().sum(-1) > 0
    assert sorted(places.tolist()) == moved.nonzero().flatten().tolist()
    assert image.grad is not None
    pixels = image.grad.abs().unflatten(-1, (8, 8)).unflatten(2, (8, 8)).sum((0, 1, 3, 5)).flatten() > 0
    assert torch.equal(pixels, moved[1:])


def test_in_evaluation_all_patches_are_seen() -> None:
    encoder, plain = pair("vit_nano", patch_drop=(0.5, 0.5))
    encoder.eval()
    images, _ = sizes(encoder, (0.0, 0.0))
    for ours, x in zip(encoder(images), images, strict=True):
        torch.testing.assert_close(ours, plain(x), rtol=1e-7, atol=1e-7)
    assert encoder.train().patch_features(images[0]).shape == (2, 4, 4, 128)  # in training mode, too


@pytest.mark.parametrize("name", ["vit_nano", "vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"])
def test_beside_stochastic_depth(name: str) -> None:
    """A row of which stochastic depth takes subsets, against the same subsets of rows that are computed whole: each
    sequence's tokens turn by their own places' angles."""
    encoder, _ = pair(name, patch_drop=(0.5, 0.3), drop_path=0.5, drop_path_uniform=True)
    encoder.train()
    images = [torch.randn(6, 3, 64, 64).double(), torch.randn(4, 3, 32, 32).double()]
    with torch.no_grad():
        embedded, ropes = zip(
            *(packed.embed(encoder.backbone, x, s) for x, s in zip(images, (0.5, 0.3), strict=True)), strict=True
        )
        packing = Packing(tuple((len(x), x.shape[1]) for x in embedded))
        assert packing == encoder.packing([(6, 64), (4, 32)])
        x = torch.cat([x.flatten(0, 1) for x in embedded])
        row = next(packed.rows(encoder.blocks, packing, ropes, x.device, "sdpa"))  # type: ignore[arg-type]
        block: Any = encoder.eval().blocks[0]
        whole = next(packed.rows([block], packing, ropes, x.device, "sdpa"))
        assert row.kept is not None
        index = row.kept[0].taken
        torch.testing.assert_close(block.attn(x[index], row), block.attn(x, whole)[index])


def test_the_row_is_as_long_as_the_patches_that_stay() -> None:
    encoder = Encoder("vit_nano", image_size=64, options={"depth": 1, "reg_tokens": 3}, patch_drop=(0.3, 0.9))
    assert encoder.packing([(2, 64), (5, 32), (1, 32)]) == Packing(((2, 4 + 44), (5, 4 + 1), (1, 4 + 16)))


@pytest.mark.parametrize("name", ["resnet10t", "swin_tiny_patch4_window7_224", "convnext_atto", "mixer_s32_224"])
def test_what_has_no_packed_blocks_is_refused(name: str) -> None:
    with torch.device("meta"):
        Encoder(name, image_size=224)
        with pytest.raises(UserError, match=rf"model\.patch_drop=0, 0\.3 leaves patches out .* {name} has none"):
            Encoder(name, image_size=224, patch_drop=(0.0, 0.3))
