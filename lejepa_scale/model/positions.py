"""Positions of patches for images of any size: tables resampled by a matrix that is made once, and rotary ones that are made
once. Values are timm's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import RotaryEmbeddingCat, RotaryEmbeddingDinoV3
from torch import Tensor

Grid = tuple[int, int]  # rows, columns
_FIXED = (RotaryEmbeddingCat, RotaryEmbeddingDinoV3)  # nothing in them is learned
_made: WeakKeyDictionary[Any, dict[Any, Tensor]] = WeakKeyDictionary()


def tokens(backbone: Any, patches: Float[Tensor, "b places e"], grid: Grid) -> Float[Tensor, "b l e"]:
    """Class and register tokens and the patches, with the table of positions where there is one: timm's `_pos_embed` of
    VisionTransformer and Eva."""
    prefix = [t.expand(len(patches), -1, -1) for t in (backbone.cls_token, backbone.reg_token) if t is not None]
    table = backbone.pos_embed
    if table is not None:
        ahead = 0 if backbone.no_embed_class else backbone.num_prefix_tokens
        table = resampled(table, ahead, backbone.patch_embed.grid_size, grid, owner=backbone)
    if table is not None and backbone.no_embed_class:
        patches = patches + table
    joined = torch.cat([*prefix, patches], 1) if prefix else patches
    if table is not None and not backbone.no_embed_class:
        joined = joined + table
    return backbone.pos_drop(joined)


def resampled(
    table: Float[Tensor, "1 l e"], prefix: int, old: Grid, new: Grid, *, owner: Any
) -> Float[Tensor, "1 _l e"]:
    """A table of positions for another grid, behind `prefix` that have no place in it: bicubic, antialiased, in fp32, as
    timm's `resample_abs_pos_embed`. One matrix product, whose gradient is another: deterministic on every device, which that
    of torch's interpolation on CUDA is not. owner: the model, with which the matrix is kept."""
    key = tuple(old), tuple(new), table.device
    if key[0] == key[1]:
        return table
    matrix = _once(owner, key, lambda: _resampling(old, new, table.device))
    with nullcontext() if table.is_meta else torch.autocast(table.device.type, enabled=False):
        patches = (matrix @ table[0, prefix:].float()).to(table.dtype)
    return torch.cat([table[:, :prefix], patches[None]], 1)


def _resampling(old: Grid, new: Grid, device: torch.device) -> Float[Tensor, "new old"]:
    """What interpolation makes of every single place."""
    places = torch.eye(old[0] * old[1], device=device).view(1, -1, *old)
    return F.interpolate(places, size=tuple(new), mode="bicubic", antialias=True)[0].flatten(1).T.contiguous()


def rotary(rope: Any, grid: Grid) -> Float[Tensor, "..."]:
    """Sines and cosines for a grid, as timm's `get_embed` gives them, which makes those of DINOv3 on the host each time."""
    buffer: Any = getattr(rope, "periods" if isinstance(rope, RotaryEmbeddingDinoV3) else "bands", None)
    if buffer is None or not isinstance(rope, _FIXED) or (rope.training and getattr(rope, "aug_active", False)):
        return rope.get_embed(shape=grid)
    return _once(rope, (grid, buffer.device, buffer.dtype), lambda: rope.get_embed(shape=list(grid)))


def _once(owner: Any, key: Any, make: Callable[[], Tensor]) -> Tensor:
    """What was made for this key before, or is now, and kept as long as its owner lives."""
    made = _made.setdefault(owner, {})
    if key not in made:
        with torch.inference_mode(False), torch.no_grad():
            made[key] = make()
    return made[key]
