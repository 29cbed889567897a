"""Packed blocks against timm itself, one resolution at a time: value and gradient in float64. Stochastic depth by subset
against branches that are computed whole and masked."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from lejepa_scale.model import Encoder
from lejepa_scale.model.attention import Packing, offsets
from lejepa_scale.model.packed import PackedRow, rows

NARROW = {"depth": 2, "embed_dim": 96, "num_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "vit_nano": {},
    "vit_tiny_patch16_224": {"depth": 2},
    "vit_small_patch14_reg4_dinov2": {"depth": 2, "init_values": 0.1},
    "vit_giant_patch14_dinov2": NARROW,  # SwiGLU
    "vit_medium_patch16_gap_240": {"depth": 2},  # average pooling, no class token
    "vit_so400m_patch14_siglip_224": NARROW,  # attention pooling
    "vit_large_patch14_clip_224": NARROW,  # normalized embeddings
    "deit3_small_patch16_224": {"depth": 2},
    "eva_giant_patch14_224": NARROW,
    "eva02_tiny_patch14_224": {"depth": 2},  # rotary positions, SwiGLU
    "eva02_base_patch14_448": NARROW,  # separate projections, normalized SwiGLU
    "eva02_enormous_patch14_clip_224": NARROW,  # post-norm
    "vit_small_patch16_dinov3": {"depth": 2},
    "vit_small_plus_patch16_dinov3": {"depth": 2},
    "vit_small_patch16_dinov3_qkvb": {"depth": 2},
    "vit_small_patch16_rope_mixed_224": {"depth": 2},  # learned angles of each block and head
    "vit_pe_core_tiny_patch16_384": {"depth": 2},
    "vit_medium_patch16_rope_reg1_gap_256": {"depth": 2},
    "vit_base_patch16_sapiens2": NARROW | {"num_kv_heads": (4, 2)},  # grouped queries in one block
}


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_equals_timm_per_resolution(name: str) -> None:
    encoder = (
        Encoder(name, image_size=64, patch_size=16, options=FAMILIES[name]).double().eval()
    )  # some move rotary positions at random
    assert encoder.packed
    plain = timm.create_model(**encoder.timm_arguments).double().eval()
    plain.load_state_dict(encoder.backbone.state_dict())
    images = [torch.randn(2, 3, 64, 64).double(), torch.randn(3, 3, 32, 48).double()]
    ours, theirs = encoder(images), [plain(x) for x in images]
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-9, atol=2e-8)  # positions are resampled in fp32, by both
    for outputs in (ours, theirs):
        sum(out.square().sum() for out in outputs).backward()
    for (key, a), (other, b) in zip(encoder.backbone.named_parameters(), plain.named_parameters(), strict=True):
        assert key == other
        if b.grad is None:
            assert a.grad is None
        else:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-8, msg=key)


def test_every_family_comes_back_from_its_own_checkpoint() -> None:
    encoder = Encoder("vit_small_patch16_dinov3", image_size=32, options={"depth": 1})
    plain = timm.create_model(**encoder.timm_arguments)
    assert encoder.backbone.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("name", ["vit_nano", "vit_small_patch16_dinov3", "eva02_enormous_patch14_clip_224"])
def test_a_subset_equals_whole_branches_masked(name: str) -> None:
    options = {"depth": 2} if name != "eva02_enormous_patch14_clip_224" else NARROW
    encoder = Encoder(
        name, image_size=64, patch_size=16, drop_path=0.5, drop_path_uniform=True, options=options
    ).double()
    block = encoder.blocks[0]
    packing = Packing(((6, 5), (9, 3)))
    row = next(rows(encoder.blocks, packing, [None], torch.device("cpu"), "sdpa"))
    assert row.branch == Packing(((3, 5), (4, 3)))
    x = torch.randn(packing.tokens, encoder.embed_dim, dtype=torch.float64, requires_grad=True)
    found = block(x, row)

    everything = PackedRow(packing, packing, offsets(packing, x.device), None, None, None, "sdpa")
    half = _branch(block, x, everything, "attn", "norm1", ("ls1", "gamma_1"))
    y = x + half * _mask(row, 0)
    expected = y + _branch(block, y, everything, "mlp", "norm2", ("ls2", "gamma_2")) * _mask(row, 1)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    inputs = [x, *block.parameters()]
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), inputs) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


def _branch(block: Any, x: Tensor, row: PackedRow, inner: str, norm: str, scale: tuple[str, str]) -> Tensor:
    def compute(y: Tensor) -> Tensor:
        return block.attn(y, row) if inner == "attn" else block.mlp(y)

    out = getattr(block, norm)(compute(x)) if block.post_norm else compute(getattr(block, norm)(x))
    if getattr(block, scale[1], None) is not None:
        return out * getattr(block, scale[1])
    return getattr(block, scale[0], lambda y: y)(out)


def _mask(row: PackedRow, branch: int) -> Tensor:
    """[T, 1]: n / k for the tokens of the k kept among a group's n sequences, else 0."""
    assert row.kept is not None
    index, parts = row.kept[branch].taken, []
    first = begin = 0
    for (count, length), (kept, _) in zip(row.packing.groups, row.branch.groups, strict=True):
        tokens = (index[begin : begin + kept * length].long() - first).unflatten(0, (kept, length))
        sequences = tokens[:, 0] // length
        assert torch.equal(tokens, sequences[:, None] * length + torch.arange(length))  # whole ones, in their order
        scale = torch.zeros(count, dtype=torch.float64).index_fill(0, sequences, count / kept)
        parts.append(scale.repeat_interleave(length))
        first, begin = first + count * length, begin + kept * length
    return torch.cat(parts)[:, None]


def test_subsets_are_drawn_anew_for_every_block_and_branch() -> None:
    encoder = Encoder("vit_nano", image_size=32, drop_path=0.5, drop_path_uniform=True)
    packing = Packing(((64, 2),))

    def draw() -> list[tuple[int, ...]]:
        found = rows(encoder.blocks, packing, [None], torch.device("cpu"), "sdpa")
        return [tuple((kept.taken[::2] // 2).tolist()) for row in found if row.kept for kept in row.kept]

    torch.manual_seed(3)
    first = draw()
    assert len(set(first)) == 2 * len(encoder.blocks)  # all different
    assert all(len(set(kept)) == 32 for kept in first)
    counts = torch.bincount(torch.tensor([draw() for _ in range(40)]).flatten(), minlength=64)
    assert counts.float().std() < 3 * (320 * 0.25) ** 0.5  # every sequence has the same chance: binomial
    torch.manual_seed(3)
    assert draw() == first
    encoder.eval()
    assert draw() == []


def test_rates_grow_from_block_to_block_or_are_uniform() -> None:
    rates = [b.drop_path for b in Encoder("vit_nano", image_size=32, drop_path=0.3).blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    uniform = Encoder("vit_nano", image_size=32, drop_path=0.3, drop_path_uniform=True)
    assert [b.drop_path for b in uniform.blocks] == [0.3] * 4
    assert uniform.blocks[0].kept(Packing(((10, 4), (1, 2)))) == Packing(((7, 4), (1, 2)))  # one stays at least
