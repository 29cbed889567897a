"""What the class token of a vision transformer attends to in the last block: the weights that the block itself computes,
read from its call of attention. Refuses to guess: where they cannot be read, or do not give its result, it says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SOFTMAX = (torch.softmax, torch.Tensor.softmax, F.softmax)
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class NoAttention(Exception):
    """There is no class token, or its attention cannot be read. The message says why."""


@dataclass(frozen=True)
class Attention:
    """Weights of the class token: a row of softmax(q k^T / sqrt(d)). Those of all tokens add up to 1."""

    patches: Float[Tensor, "b heads rows columns"]
    prefix: Float[Tensor, "b heads _prefix"]  # on itself, and on registers


@torch.no_grad()
def class_attention(model: Any, images: Float[Tensor, "b c h w"]) -> Attention:
    """Of timm's model, in eval mode. Raises NoAttention, with the reason."""
    prefix = _prefix_of(model)
    block, given = model.blocks[-1], list[tuple[Any, Any]]()
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True)
    try:
        model.forward_features(images)
    finally:
        handle.remove()
    if len(given) != 1:
        raise NoAttention("its last block does not run once")
    rows, columns = _grid(model, images)
    with _Recorder(prefix + rows * columns) as seen:
        block(*given[0][0], **given[0][1])
    if len(seen.weights) != 1:
        raise NoAttention("its last block's attention is none that is understood here")
    weights = seen.weights[0].float().cpu()
    return Attention(weights[..., prefix:].unflatten(-1, (rows, columns)), weights[..., :prefix])


def _prefix_of(model: Any) -> int:
    """How many tokens stand before the patches, the class token first. Raises NoAttention."""
    count, blocks = int(getattr(model, "num_prefix_tokens", 0)), getattr(model, "blocks", None)
    has_one = getattr(model, "has_class_token", None)
    if not count or not (getattr(model, "cls_token", None) is not None if has_one is None else has_one):
        raise NoAttention("it has no class token")
    if not blocks or not callable(getattr(blocks[-1], "register_forward_pre_hook", None)):
        raise NoAttention("its blocks are none that are understood here")
    return count


def _grid(model: Any, images: Float[Tensor, "b c h w"]) -> tuple[int, int]:
    """Rows and columns of patches. Raises NoAttention."""
    size: Callable[..., tuple[int, int]] | None = getattr(
        getattr(model, "patch_embed", None), "dynamic_feat_size", None
    )
    if size is None:
        raise NoAttention("its patches are not on a grid that is known here")
    rows, columns = size((images.shape[-2], images.shape[-1]))
    return int(rows), int(columns)


class _Recorder(TorchFunctionMode):
    """Attention over `tokens` tokens that is computed inside: the first token's weights [B, heads, tokens]."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.weights: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention and out.ndim == 4 and out.shape[-2] == self.tokens:
            self.weights.append(_first_row(out, **dict(zip(_ARGUMENTS, args, strict=False)), **kwargs))
        elif func in _SOFTMAX and out.ndim == 4 and out.shape[-2:] == (self.tokens, self.tokens):
            self.weights.append(out[:, :, 0])
        return out


def _first_row(
    out: Float[Tensor, "b heads n _v"],
    query: Float[Tensor, "b heads n d"],
    key: Float[Tensor, "b _kv n d"],
    value: Float[Tensor, "b _kv n _v"],
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "b heads n"]:
    """The first query's weights, checked against what torch's attention gave. Raises NoAttention where they differ."""
    shared = query.shape[1] // key.shape[1]  # queries of one key, where they are grouped
    key, value = (x.repeat_interleave(shared, 1) if shared > 1 else x for x in (key, value))
    scores = query[:, :, :1] @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        mask = attn_mask.expand(*attn_mask.shape[:-2], query.shape[-2], key.shape[-2])[..., :1, :]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1)  # [B, heads, 1, N]
    loose = 1e-4 if out.dtype == torch.float32 else 2e-2
    if is_causal or not torch.allclose(weights @ value, out[:, :, :1], rtol=loose, atol=loose * float(out.abs().max())):
        raise NoAttention("the weights of its attention do not give its result")
    return weights[:, :, 0]
