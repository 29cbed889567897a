"""timm's transformer blocks over one packed row of tokens, with the same parameters under the same names. Stochastic depth
leaves sequences out instead of computing and zeroing them. Refuses blocks whose mathematics it does not know."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from lejepa_scale.model import positions
from lejepa_scale.model.attention import BACKENDS, Offsets, Packing, offsets

_MODELS = (VisionTransformer, Eva)
_PRE_NORM, _POST_NORM = (Block, EvaBlock), (ResPostBlock, EvaBlockPostNorm)
_ATTENTIONS = (Attention, EvaAttention, AttentionRope)

Kept = tuple[Int[Tensor, " _k"], ...]  # of every group, the sequences that a branch processes


class PackedRow(NamedTuple):
    """A packed row as one block meets it."""

    packing: Packing
    branch: Packing  # what of it each residual branch processes: all, or a subset of every group
    starts: Offsets  # of the sequences of `branch`
    kept: tuple[Kept, Kept] | None  # for the attention and for the MLP branch; None: everything
    rope: tuple[Float[Tensor, "_l _h _two_d"], ...] | None  # sines and cosines of every group, by position (and head)
    backend: str


class PackedBlock(nn.Module):
    """A residual block of timm (pre-norm or post-norm, with or without layer scale) over a row of tokens."""

    norm1: nn.Module
    norm2: nn.Module
    mlp: nn.Module

    def __init__(self, block: Any, drop_path: float | None = None) -> None:
        super().__init__()
        _adopt(self, block)
        self.attn = PackedAttention(block.attn)
        self.post_norm = type(block) in _POST_NORM
        own = float(getattr(block.drop_path1, "drop_prob", 0.0) or 0.0)
        self.drop_path = own if drop_path is None else drop_path
        self.drop_path1 = self.drop_path2 = nn.Identity()

    def kept(self, packing: Packing) -> Packing:
        """What each residual branch processes in training."""
        return packing.thinned(self.drop_path) if self.drop_path else packing

    def forward(self, x: Float[Tensor, "t e"], row: PackedRow) -> Float[Tensor, "t e"]:
        for_attention, for_mlp = row.kept or (None, None)
        own = _select(x, row, for_attention)
        own = self.norm1(self.attn(own, row)) if self.post_norm else self.attn(self.norm1(own), row)
        x = _add(x, self._scale(own, "ls1", "gamma_1"), row, for_attention)
        own = _select(x, row, for_mlp)
        own = self.norm2(self.mlp(own)) if self.post_norm else self.mlp(self.norm2(own))
        return _add(x, self._scale(own, "ls2", "gamma_2"), row, for_mlp)

    def _scale(self, x: Float[Tensor, "t e"], module: str, parameter: str) -> Float[Tensor, "t e"]:
        """Layer scale, which timm's two families of blocks spell differently; none where the block has none."""
        if (gamma := getattr(self, parameter, None)) is not None:
            return x * gamma
        return getattr(self, module)(x) if hasattr(self, module) else x


class PackedAttention(nn.Module):
    """Multi-head self-attention of timm over a row of tokens: fused or separate projections, grouped queries, normalized
    queries and keys, rotary positions."""

    qkv: nn.Module | None
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module
    proj: nn.Module
    proj_drop: nn.Module
    q_bias: Float[Tensor, " e"]
    k_bias: Float[Tensor, " e"]
    v_bias: Float[Tensor, " e"]

    def __init__(self, attn: Any) -> None:
        super().__init__()
        _adopt(self, attn)
        if not hasattr(self, "qkv"):
            self.qkv = None
        self.num_heads, self.head_dim = int(attn.num_heads), int(attn.head_dim)
        self.rotate_half = bool(getattr(attn, "rotate_half", False))

    def forward(self, x: Float[Tensor, "t e"], row: PackedRow) -> Float[Tensor, "t e"]:
        q, k, v = self._project(x)
        q, k = self.q_norm(q), self.k_norm(k)
        if row.rope is not None:
            q, k = (self._rotate(part, row.branch, row.rope) for part in (q, k))
        q, k = q.to(v.dtype), k.to(v.dtype)
        if k.shape[1] != self.num_heads:
            k, v = (part.repeat_interleave(self.num_heads // part.shape[1], 1) for part in (k, v))
        out = self.norm(BACKENDS[row.backend](q, k, v, row.branch, row.starts).flatten(1))
        return self.proj_drop(self.proj(out))

    def _project(
        self, x: Float[Tensor, "t e"]
    ) -> tuple[Float[Tensor, "t h d"], Float[Tensor, "t g d"], Float[Tensor, "t g d"]]:
        """Queries, and keys and values of g <= h heads."""
        if self.qkv is None:
            parts = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        else:
            joined = self.qkv(x)
            if getattr(self, "q_bias", None) is not None:
                joined = joined + torch.cat([self.q_bias, self.k_bias, self.v_bias]).to(joined.dtype)
            parts = joined.chunk(3, -1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        return q, k, v

    def _rotate(
        self, x: Float[Tensor, "t h d"], packing: Packing, tables: Sequence[Float[Tensor, "_l _h 2*d"]]
    ) -> Float[Tensor, "t h d"]:
        parts = zip(packing.split(x), tables, strict=True)
        return torch.cat([apply_rot_embed_cat(part, table, self.rotate_half).flatten(0, 1) for part, table in parts])


def packable(backbone: Any) -> bool:
    """Whether every block is one whose packed form is here."""
    if type(backbone) not in _MODELS or (isinstance(backbone, Eva) and backbone.patch_drop is not None):
        return False
    return all(
        type(block) in _PRE_NORM + _POST_NORM
        and type(block.attn) in _ATTENTIONS
        and not block.attn.attn_drop.p
        and getattr(block.attn, "gate", None) is None
        for block in backbone.blocks
    )


def embed(
    backbone: Any, images: Float[Tensor, "b c h w"]
) -> tuple[Float[Tensor, "b l e"], Float[Tensor, "_depth l _heads _two_d"] | None]:
    """Tokens that enter the blocks, and the sines and cosines of rotary positions, [depth or 1, L, H or 1, 2 D]."""
    patches = backbone.patch_embed(images)
    grid = tuple(backbone.patch_embed.dynamic_feat_size(images.shape[-2:]))
    tokens = positions.tokens(backbone, patches.reshape(len(patches), -1, patches.shape[-1]), grid)
    if not isinstance(backbone, Eva):
        return backbone.norm_pre(backbone.patch_drop(tokens)), None
    rope = None
    if backbone.rope is not None:
        rope = positions.rotary(backbone.rope, grid)
        rope = rope.transpose(1, 2) if backbone.rope_mixed else rope[None, :, None]  # mixed: [depth, H, L, 2 D]
        prefix = rope.new_zeros(len(rope), backbone.num_prefix_tokens, *rope.shape[2:])
        prefix[..., rope.shape[-1] // 2 :] = 1  # class and register tokens turn by no angle
        rope = torch.cat([prefix, rope], 1)
    return backbone.norm_pre(tokens), rope


def rows(
    blocks: Sequence[PackedBlock],
    packing: Packing,
    ropes: Sequence[Float[Tensor, "_depth _l _heads _two_d"] | None],
    device: torch.device,
    backend: str,
) -> Iterator[PackedRow]:
    """One row per block. In training the sequences that a branch leaves out are drawn here, for all blocks at once."""
    orders = None
    if any(block.training and block.drop_path for block in blocks):
        orders = [torch.rand(len(blocks), 2, n, device=device).argsort(-1) for n, _ in packing.groups]
    for i, block in enumerate(blocks):
        branch, kept = packing, None
        if orders is not None and block.training and (branch := block.kept(packing)) != packing:
            for_attention, for_mlp = (
                tuple(order[i, b, :n] for order, (n, _) in zip(orders, branch.groups, strict=True)) for b in (0, 1)
            )
            kept = for_attention, for_mlp
        tables = None if ropes[0] is None else tuple(t[min(i, len(t) - 1)] for t in ropes if t is not None)
        yield PackedRow(packing, branch, offsets(branch, device), kept, tables, backend)


def _select(x: Float[Tensor, "t e"], row: PackedRow, kept: Kept | None) -> Float[Tensor, "k e"]:
    """The tokens of the sequences that a branch processes."""
    if kept is None:
        return x
    if torch.compiler.is_compiling():  # which joins these operations itself
        parts = zip(row.packing.split(x), kept, strict=True)
        return torch.cat([part.index_select(0, rows).flatten(0, 1) for part, rows in parts])
    return _SelectRows.apply(x, row.packing, row.branch, *kept)


def _add(x: Float[Tensor, "t e"], own: Float[Tensor, "k e"], row: PackedRow, kept: Kept | None) -> Float[Tensor, "t e"]:
    """Residual sum; what a subset contributes is scaled up to keep the mean."""
    if kept is None:
        return x + own
    if torch.compiler.is_compiling():
        parts = zip(row.packing.split(x), kept, row.branch.split(own.to(x.dtype)), strict=True)
        sums = [part.index_add(0, rows, added, alpha=len(part) / len(added)) for part, rows, added in parts]
        return torch.cat([part.flatten(0, 1) for part in sums])
    return _AddRows.apply(x, own, row.packing, row.branch, *kept)


class _SelectRows(torch.autograd.Function):
    """`index_select` in every group of a row, into one row: nothing is joined afterwards, forward or backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "t e"], packing: Packing, branch: Packing, *kept: Int[Tensor, " _k"]
    ) -> Float[Tensor, "k e"]:
        ctx.save_for_backward(*kept)
        ctx.packing, ctx.branch = packing, branch
        return _gather(x, packing, branch, kept)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: Float[Tensor, "k e"]
    ) -> tuple[Float[Tensor, "t e"] | None, ...]:
        out, kept = grad.new_zeros(ctx.packing.tokens, grad.shape[1]), ctx.saved_tensors
        for part, rows, given in zip(ctx.packing.split(out), kept, ctx.branch.split(grad), strict=True):
            part.index_copy_(0, rows, given)  # none is there twice
        return out, None, None, *[None] * len(kept)


class _AddRows(torch.autograd.Function):
    """`index_add` in every group of a row, scaled up by what is left out of it. torch's would keep what it adds for the
    backward pass, which needs its shape alone: a branch's whole output, in every block."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "t e"],
        own: Float[Tensor, "k e"],
        packing: Packing,
        branch: Packing,
        *kept: Int[Tensor, " _k"],
    ) -> Float[Tensor, "t e"]:
        ctx.save_for_backward(*kept)
        ctx.packing, ctx.branch, ctx.dtype = packing, branch, own.dtype
        out = x.clone()
        for part, rows, added in zip(packing.split(out), kept, branch.split(own.to(x.dtype)), strict=True):
            part.index_add_(0, rows, added, alpha=len(part) / len(added))
        return out

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: Float[Tensor, "t e"]
    ) -> tuple[Float[Tensor, "_t_or_k e"] | None, ...]:
        kept = ctx.saved_tensors
        of_own = _gather(grad, ctx.packing, ctx.branch, kept)
        for (all_of_it, _), part in zip(ctx.packing.groups, ctx.branch.split(of_own), strict=True):
            part.mul_(all_of_it / len(part))
        return grad, of_own.to(ctx.dtype), None, None, *[None] * len(kept)


def _gather(
    x: Float[Tensor, "t e"], packing: Packing, branch: Packing, kept: Sequence[Int[Tensor, " _k"]]
) -> Float[Tensor, "k e"]:
    out = x.new_empty(branch.tokens, x.shape[1])
    for part, rows, place in zip(packing.split(x), kept, branch.split(out), strict=True):
        torch.index_select(part, 0, rows, out=place)
    return out


def _adopt(target: nn.Module, source: nn.Module) -> None:
    """Give `target` the parameters, buffers and submodules of `source` under their names."""
    target._parameters.update(source._parameters)
    target._buffers.update(source._buffers)
    target._non_persistent_buffers_set |= source._non_persistent_buffers_set
    for name, child in source.named_children():
        target.add_module(name, child)
