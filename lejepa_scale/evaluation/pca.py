"""Principal components of patch features, as colours; and which patches are foreground, by the first component."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from lejepa_scale.errors import UserError

_MOST_ROWS = 32_768  # that components are found from; more change nothing that can be seen
_NOTHING = 1e-12  # of the variance: no direction
_NOISE = 1e-5  # of the features' size: what varies by less is rounding
_BINS = 256  # of Otsu's histogram
_SEPARATION = 0.7  # at least, of the two sides of Otsu's threshold: a normal distribution cut in two has 2 / pi = 0.64
_CONTRAST = 0.2  # at least: by so much more of the middle is foreground than of the border; untrained encoders have 0.1
_FEW = 0.03  # less of the patches is no foreground, or no background


@dataclass(frozen=True)
class Components:
    """The strongest principal components of some rows. `size` is the root mean square of a row's length."""

    mean: Float[Tensor, " e"]
    axes: Float[Tensor, "k e"]  # strongest first, of length 1; zeros where the rows have fewer
    shares: Float[Tensor, " k"]  # of the variance
    size: float
    spread: float  # the root mean square of a row's distance to the mean

    @property
    def varies(self) -> bool:
        """Whether the rows differ by more than rounding."""
        return self.spread > _NOISE * self.size

    def project(self, rows: Float[Tensor, "*n e"]) -> Float[Tensor, "*n k"]:
        return (rows.float() - self.mean) @ self.axes.T


def components(rows: Float[Tensor, "n e"], count: int = 3) -> Components:
    """The first `count`, from an eigendecomposition of the smaller of [e, e] and [n, n], in double. Signs are fixed by the
    largest entry. Of more than 32,768 rows so many are drawn, always the same. Raises UserError for no rows, and for rows
    that are not finite."""
    if not len(rows) or not rows.isfinite().all():
        raise UserError("the features of some patches are not finite: this encoder has no picture.")
    if len(rows) > _MOST_ROWS:
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:_MOST_ROWS].to(rows.device)]
    x = rows.double()
    size = float(x.square().sum(1).mean().sqrt())
    mean = x.mean(0)
    x = x - mean
    if len(x) < x.shape[1]:
        values, vectors = torch.linalg.eigh(x @ x.T)
        vectors = x.T @ vectors[:, -count:]
        vectors = vectors / vectors.norm(dim=0).clamp_min(1e-300)
    else:
        values, vectors = torch.linalg.eigh(x.T @ x)
        vectors = vectors[:, -count:]
    top, axes = values[-count:].flip(0).clamp_min(0), vectors.T.flip(0)
    missing, total = count - len(axes), values.clamp_min(0).sum()
    axes = torch.where((top > _NOTHING * total)[:, None] & axes.isfinite(), axes, 0.0)
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    axes, top = torch.cat([axes, axes.new_zeros(missing, axes.shape[1])]), torch.cat([top, top.new_zeros(missing)])
    return Components(
        mean.float(), axes.float(), (top / total.clamp_min(1e-300)).float(), size, float((total / len(x)).sqrt())
    )


def colours(projected: Float[Tensor, "n k"], size: float) -> Float[Tensor, "n k"]:
    """Every component between its 2nd and 98th percentile, as 0..1; the middle where it is constant but for rounding, beside
    rows of this size."""
    low, high = (torch.from_numpy(np.percentile(projected.numpy(), q, axis=0)).float() for q in (2, 98))
    spread = high - low
    flat = spread <= _NOISE * size
    return torch.where(flat, 0.5, ((projected - low) / torch.where(flat, 1.0, spread)).clamp(0, 1))


def pca_maps(features: Float[Tensor, "b h w e"]) -> Float[Tensor, "b h w 3"]:
    """RGB in 0..1, by the first three components over all images. Raises UserError as `components` does."""
    coloured, _ = shared_colours(list(features))
    return torch.stack(coloured)


def shared_colours(
    maps: Sequence[Float[Tensor, "_h _w e"]],
) -> tuple[list[Float[Tensor, "_h _w 3"]], Components]:
    """RGB in 0..1 of maps of any sizes, and the components, of them all together: a colour means the same in each. Raises
    UserError as `components` does."""
    rows = torch.cat([x.flatten(0, 1) for x in maps])
    found = components(rows)
    return _cut(colours(found.project(rows), found.size), maps), found


def _cut(rows: Shaped[Tensor, "n k"], maps: Sequence[Float[Tensor, "_h _w e"]]) -> list[Shaped[Tensor, "_h _w k"]]:
    """Rows of all maps, one behind the other, as maps of their shapes."""
    parts = rows.split([x.shape[0] * x.shape[1] for x in maps])
    return [part.unflatten(0, x.shape[:2]) for part, x in zip(parts, maps, strict=True)]


# -- foreground


@dataclass(frozen=True)
class Foreground:
    """Which patches are foreground, or why that cannot be told (`masks` is then empty). threshold: of the first component,
    scaled to 0..1 and turned so that the border of the images is low."""

    masks: list[Bool[Tensor, "_h _w"]]
    threshold: float
    why_not: str = ""


def foreground(maps: Sequence[Float[Tensor, "_h _w e"]], threshold: float | None = None) -> Foreground:
    """By the first principal component over all maps, as DINOv2's figures have it. Its sign is the one by which the border
    of the images, mostly background, is lower than their middle. threshold: unset, Otsu's; then there is no foreground
    where the two sides are not clearly two, or the border has nearly as much of it as the middle. Raises UserError as
    `components` does."""
    rows = torch.cat([x.flatten(0, 1) for x in maps])
    found = components(rows, 1)
    projected = found.project(rows)
    edge = torch.cat([_border(x.shape[0], x.shape[1]).flatten() for x in maps])
    if edge.all():
        return Foreground([], 0.0, "the maps are too small to have a border and a middle")
    if projected[edge].mean() > projected[~edge].mean():
        projected = -projected
    scaled = colours(projected, found.size)
    at, separation = otsu(scaled.flatten())
    if threshold is not None:
        at = threshold
    mask = scaled > at
    shares = [float(mask[where].float().mean()) for where in (edge, ~edge)]
    whole, why = float(mask.float().mean()), ""
    if not mask.any() or mask.all():
        why = f"no patch lies on the other side of {at:.2f}"
    elif threshold is None and separation < _SEPARATION:
        why = f"the first component has no two sides (Otsu's separation is {separation:.2f}, of 1)"
    elif threshold is None and (min(whole, 1 - whole) < _FEW or shares[1] - shares[0] < _CONTRAST):
        why = f"by the first component, {shares[0]:.0%} of the border and {shares[1]:.0%} of the middle would be foreground"
    masks = [] if why else [part[..., 0] for part in _cut(mask, maps)]
    return Foreground(masks, at, why)


def foreground_colours(
    maps: Sequence[Float[Tensor, "_h _w e"]], masks: Sequence[Bool[Tensor, "_h _w"]]
) -> list[Float[Tensor, "_h _w 3"]]:
    """RGB in 0..1 by the components of the foreground of all maps alone; NaN elsewhere. Raises UserError as `components`
    does."""
    inside = torch.cat([mask.flatten() for mask in masks])
    rows = torch.cat([x.flatten(0, 1) for x in maps])[inside]
    found = components(rows)
    out = torch.full((len(inside), 3), torch.nan)
    out[inside] = colours(found.project(rows), found.size)
    return _cut(out, maps)


def otsu(values: Float[Tensor, " n"]) -> tuple[float, float]:
    """The threshold of values in 0..1 between whose sides the variance is largest (Otsu 1979), and the share of the whole
    variance that this is."""
    counts = torch.histc(values.double(), _BINS, 0, 1)
    at = (torch.arange(_BINS, dtype=torch.float64) + 0.5) / _BINS
    share = (counts / counts.sum()).cumsum(0)
    mean = (counts / counts.sum() * at).cumsum(0)
    between = (mean[-1] * share - mean).square() / (share * (1 - share)).clamp_min(1e-12)
    best = between == between.max()
    variance = float((counts / counts.sum() * (at - mean[-1]).square()).sum())
    edge = (at[best].mean() + 0.5 / _BINS).item()  # the middle of a gap, where it does not matter
    return edge, float(between.max()) / variance if variance else 0.0


def _border(height: int, width: int) -> Bool[Tensor, "{height} {width}"]:
    """The outermost tenth on every side, at least one place."""
    thick = [max(1, round(side / 10)) for side in (height, width)]
    out = torch.ones(height, width, dtype=torch.bool)
    out[thick[0] : height - thick[0], thick[1] : width - thick[1]] = False
    return out
