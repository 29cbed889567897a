"""timm's transformer blocks over one packed row of tokens, with the same parameters under the same names. Stochastic depth
leaves sequences out instead of computing and zeroing them. Refuses blocks whose mathematics it does not know."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Int32
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from lejepa_scale.model import branch, dropping, positions
from lejepa_scale.model.attention import BACKENDS, Offsets, Packing, offsets
from lejepa_scale.model.branch import Subset

_MODELS = (VisionTransformer, Eva)
_PRE_NORM, _POST_NORM = (Block, EvaBlock), (ResPostBlock, EvaBlockPostNorm)
_ATTENTIONS = (Attention, EvaAttention, AttentionRope)


class Rope(NamedTuple):
    """Rotary positions of one resolution."""

    tables: Float[Tensor, "_depth _l _heads _two_d"]  # sines and cosines, of each block and head or one for all
    places: Int[Tensor, "_b _k"] | None  # of every token, its row in the tables; None: nothing is left out


class PackedRow(NamedTuple):
    """A packed row as one block meets it."""

    packing: Packing
    branch: Packing  # what of it each residual branch processes: all, or a subset of every group
    starts: Offsets  # of the sequences of `branch`
    kept: tuple[Subset, Subset] | None  # for the attention and for the MLP branch; None: everything
    rope: tuple[Float[Tensor, "_l _h _two_d"], ...] | None  # sines and cosines of every group, by position (and head)
    places: Int32[Tensor, " k"] | None  # of each token of `branch`, its row in all of `rope`; None: sequences are whole
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
        of_attention, of_mlp = row.kept or (None, None)
        x = self._branch(x, lambda own: self.attn(own, row), self.norm1, self._gamma("ls1", "gamma_1"), of_attention)
        return self._branch(x, self.mlp, self.norm2, self._gamma("ls2", "gamma_2"), of_mlp)

    def _branch(
        self,
        x: Float[Tensor, "t e"],
        computed: Callable[[Tensor], Tensor],
        norm: nn.Module,
        gamma: Float[Tensor, " e"] | None,
        subset: Subset | None,
    ) -> Float[Tensor, "t e"]:
        """The row and what the branch makes of its tokens, or of a subset of them."""
        first, last = (None, norm) if self.post_norm else (norm, None)
        if subset is None:
            own = x if first is None else first(x)
        else:
            own, x = branch.enter(x, subset, first)
        own = computed(own)
        own = own if last is None else last(own)
        if subset is not None:
            return branch.leave(x, own, gamma, subset)
        return x + (own if gamma is None else own * gamma)

    def _gamma(self, module: str, parameter: str) -> Float[Tensor, " e"] | None:
        """Layer scale, which timm's two families of blocks spell differently; None where the block has none."""
        own = getattr(self, parameter, None)
        return getattr(getattr(self, module, None), "gamma", None) if own is None else own


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
            cut, tables = row.branch, row.rope
            if row.places is not None:  # an angle for every token, as of one long sequence
                cut, tables = Packing(((1, cut.tokens),)), (torch.cat(tables).index_select(0, row.places),)
            q, k = (self._rotate(part, cut, tables) for part in (q, k))
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
    backbone: Any, images: Float[Tensor, "b c h w"], share: float = 0.0
) -> tuple[Float[Tensor, "b _l e"], Rope | None]:
    """Tokens that enter the blocks, and rotary positions. share: of every image's patches, how many are left out once they
    have their positions; which ones is drawn here."""
    patches = backbone.patch_embed(images)
    grid = tuple(backbone.patch_embed.dynamic_feat_size(images.shape[-2:]))
    tokens = positions.tokens(backbone, patches.reshape(len(patches), -1, patches.shape[-1]), grid)
    places = None
    if share:
        prefix = backbone.num_prefix_tokens
        places = dropping.draw(len(tokens), tokens.shape[1] - prefix, prefix, share, tokens.device)
        tokens = dropping.take(tokens, places)
    if not isinstance(backbone, Eva):
        return backbone.norm_pre(backbone.patch_drop(tokens)), None
    rope = None
    if backbone.rope is not None:
        table = positions.rotary(backbone.rope, grid)
        table = table.transpose(1, 2) if backbone.rope_mixed else table[None, :, None]  # mixed: [depth, H, L, 2 D]
        ahead = table.new_zeros(len(table), backbone.num_prefix_tokens, *table.shape[2:])
        ahead[..., table.shape[-1] // 2 :] = 1  # class and register tokens turn by no angle
        rope = Rope(torch.cat([ahead, table], 1), places)
    return backbone.norm_pre(tokens), rope


def rows(
    blocks: Sequence[PackedBlock],
    packing: Packing,
    ropes: Sequence[Rope | None],
    device: torch.device,
    backend: str,
) -> Iterator[PackedRow]:
    """One row per block. In training the sequences that a branch leaves out are drawn here, for all blocks at once."""
    branches = [block.kept(packing) if block.training else packing for block in blocks]
    kept = branch.draw(packing, branches, device)
    places = _places(packing, ropes, device)
    for i, (processed, subsets) in enumerate(zip(branches, kept, strict=True)):
        tables = tuple(rope.tables[min(i, len(rope.tables) - 1)] for rope in ropes if rope is not None) or None
        own = places if places is None or subsets is None else places.index_select(0, subsets[0].taken)
        yield PackedRow(packing, processed, offsets(processed, device), subsets, tables, own, backend)


def _places(packing: Packing, ropes: Sequence[Rope | None], device: torch.device) -> Int32[Tensor, " t"] | None:
    """Of every token of the row, its place in the tables of all groups, one behind the other; None where every sequence has
    all of its group's."""
    found = [rope for rope in ropes if rope is not None]
    if all(rope.places is None for rope in found):
        return None
    parts, first = [], 0
    for (n, length), rope in zip(packing.groups, found, strict=True):
        whole = torch.arange(length, device=device).expand(n, -1)
        parts.append((first + (whole if rope.places is None else rope.places)).flatten())
        first += rope.tables.shape[1]
    return torch.cat(parts).int()


def _adopt(target: nn.Module, source: nn.Module) -> None:
    """Give `target` the parameters, buffers and submodules of `source` under their names."""
    target._parameters.update(source._parameters)
    target._buffers.update(source._buffers)
    target._non_persistent_buffers_set |= source._non_persistent_buffers_set
    for name, child in source.named_children():
        target.add_module(name, child)
