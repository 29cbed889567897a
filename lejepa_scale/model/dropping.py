"""Token dropping: which patches of every sequence stay in training. Class and register tokens always do. Owns the draw, and
the rule of timm's PatchDropout for how many stay; refuses to know what is done with them."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def staying(patches: int, share: float) -> int:
    """How many of a sequence's patches stay where a share of them, in [0, 1), is left out: rounded down, one at least, as in
    timm's PatchDropout (FLIP, Li et al., arXiv 2212.00794, section 3; PatchDropout, Liu et al., arXiv 2208.07220)."""
    return max(1, int(patches * (1.0 - share)))


def draw(sequences: int, patches: int, prefix: int, share: float, device: torch.device) -> Int[Tensor, "b k"]:
    """Places, in each of b sequences, of the k tokens that stay: the `prefix` first ones, then a random subset of the
    `patches` behind them, every subset as likely, in random order; each sequence has its own. By torch's generator of the
    device, without a wait for it."""
    order = torch.rand(sequences, patches, device=device).argsort(-1)[:, : staying(patches, share)]
    ahead = torch.arange(prefix, device=device).expand(sequences, -1)
    return torch.cat([ahead, order + prefix], 1)


def take(tokens: Float[Tensor, "b l e"], places: Int[Tensor, "b k"]) -> Float[Tensor, "b k e"]:
    """The tokens at `places`, of every sequence its own: one index into all of them."""
    b, length, _ = tokens.shape
    first = torch.arange(0, b * length, length, device=tokens.device)
    return tokens.flatten(0, 1).index_select(0, (places + first[:, None]).flatten()).unflatten(0, places.shape)
