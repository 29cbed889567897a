"""Maps of patch features by timm's model, of images of any shape that it takes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

_TOGETHER = 8  # shifted images in one forward pass
_FINE = 28  # places along the shorter side that maps have at least, if nothing says how fine they are
_FINEST = 8


def stride_of(model: Any) -> tuple[int, int]:
    """Pixels of a patch, or of a place of the last map: height and width."""
    embed: Any = getattr(model, "patch_embed", None)
    if hasattr(embed, "feat_ratio"):
        height, width = embed.feat_ratio(as_scalar=False)
        return int(height), int(width)
    info = getattr(model, "feature_info", None) or [{}]
    side = int(info[-1].get("reduction", 32))
    return side, side


@torch.no_grad()
def patch_map(model: Any, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b _rows _columns e"]:
    """Features of the patches behind the last normalization, or the last map, in their place."""
    settings: dict[str, Any] = {"indices": 1, "intermediates_only": True}
    try:
        return model.forward_intermediates(images, norm=True, **settings)[-1].movedim(1, -1)
    except AssertionError:  # networks that have no normalization after their last map say so
        return model.forward_intermediates(images, **settings)[-1].movedim(1, -1)


def finer_for(rows: int, columns: int) -> int:
    """How many times finer a map of this size is made: 28 places along its shorter side, but at most 8 times."""
    return max(1, min(_FINEST, round(_FINE / min(rows, columns))))


def dense_features(model: Any, images: Float[Tensor, "b c h w"], finer: int) -> Float[Tensor, "b _rows _columns e"]:
    """Patch features on a grid `finer` times finer than the model's own: the image is moved by fractions of a patch,
    mirrored at its border, and the maps are interleaved. Costs finer^2 forward passes."""
    height, width = images.shape[-2:]
    coarse = patch_map(model, images)
    strides = max(1, height // coarse.shape[1]), max(1, width // coarse.shape[2])
    finer = min(finer, *strides)
    if finer == 1:
        return coarse
    (above, left), starts = [stride // 2 for stride in strides], []
    padded = F.pad(images, [left, left, above, above], mode="reflect")
    for reach, stride in zip((above, left), strides, strict=True):
        starts.append([reach + round((i + 0.5) * stride / finer - stride / 2) for i in range(finer)])
    corners = [(top, side) for top in starts[0] for side in starts[1]]
    maps = list[Tensor]()
    for first in range(0, len(corners), _TOGETHER):
        some = corners[first : first + _TOGETHER]
        moved = torch.cat([padded[..., top : top + height, side : side + width] for top, side in some])
        maps += patch_map(model, moved).float().cpu().chunk(len(some))
    return rearrange(torch.stack(maps), "(i j) b h w e -> b (h i) (w j) e", i=finer)
