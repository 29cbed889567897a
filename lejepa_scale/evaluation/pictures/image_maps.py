"""The panels that lie over images: principal components of patch features, foreground, attention of the class token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Real
from torch import Tensor

from lejepa_scale.data.images.photometric import normalize
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation import pca
from lejepa_scale.evaluation.pictures.attention import Attention, NoAttention, class_attention
from lejepa_scale.evaluation.pictures.images import Images, fitted, shown
from lejepa_scale.evaluation.pictures.maps import dense_features, finer_for, patch_map, stride_of
from lejepa_scale.evaluation.pictures.panels import Panels, Settings, Shown
from lejepa_scale.evaluation.subjects import Subject
from lejepa_scale.progress import counter

_LARGEST = 448  # pixels of the shorter side, if nothing says how large
_REFUSALS = (AssertionError, RuntimeError, TypeError, ValueError)  # of many kinds in timm


def add_maps(
    out: Panels,
    model: Any,
    subject: Subject,
    images: Images,
    chosen: Sequence[int],
    settings: Settings,
    device: torch.device,
) -> None:
    """To `out`: an image for every position in `chosen`, and what lies over it. Raises UserError for an encoder without
    maps, for features that are not finite, and for images that are too large for the device."""
    stored = [images.read(position) for position in chosen]
    inputs, why = _inputs(model, stored, settings.size or min(2 * subject.image_size, _LARGEST), subject, device)
    out.left_out += [why] if why else []
    maps, attention, finer = _computed(out, model, inputs, subject, settings, device)
    coloured, found = pca.shared_colours(maps)
    masks = _masks(out, maps, settings)
    inside = pca.foreground_colours(maps, masks) if masks else []
    for i, position in enumerate(chosen):
        out.images.append(
            Shown(
                images.key(position),
                images.name(images.label(position)),
                shown(inputs[i]),
                coloured[i].numpy(),
                pca.shared_colours(maps[i : i + 1])[0][0].numpy(),
                inside[i].numpy() if inside else None,
                attention[i].patches[0].numpy() if attention else None,
            )
        )
    at = _sizes(inputs)
    _say_maps(out, maps, finer, found, at)
    if attention:
        _say_attention(out, attention, at, getattr(model, "global_pool", "token") == "token")


def _computed(
    out: Panels,
    model: Any,
    inputs: Sequence[Real[Tensor, "_c _h _w"]],
    subject: Subject,
    settings: Settings,
    device: torch.device,
) -> tuple[list[Float[Tensor, "_rows _columns _e"]], list[Attention], int]:
    """Maps of features, on the CPU; attention, if there is any; and how many times finer the maps are."""
    maps, attention, reason = list[Tensor](), list[Attention](), ""
    rows, columns = (max(1, side // step) for side, step in zip(inputs[0].shape[1:], stride_of(model), strict=True))
    finer = settings.finer or finer_for(rows, columns)
    with counter("maps", unit="image", total=len(inputs)) as progress:
        for x in inputs:
            given = normalize(x[None].to(device), subject.pixels)
            maps.append(dense_features(model, given, finer)[0].float().cpu())
            try:
                attention += [] if reason else [class_attention(model, given)]
            except NoAttention as error:
                reason = str(error)
            progress.update()
    if reason:
        out.left_out.append(f"Attention maps: {reason}.")
    return maps, [] if reason else attention, finer


def _inputs(
    model: Any, stored: Sequence[Real[np.ndarray, "_h _w _c"]], size: int, subject: Subject, device: torch.device
) -> tuple[list[Real[Tensor, "_c _h _w"]], str]:
    """The images, values 0..255, as large as the encoder is to see them: of those that it refuses in their own shape the
    middle squares, at its own size if it takes no other. And what has to be said of that. Raises UserError where it refuses
    these, too."""
    stride, own, refused = stride_of(model), subject.image_size, ""
    for side, step, square in ((size, stride, False), (size, stride, True), (own, (1, 1), True)):
        found = [fitted(image, side, step, square=square) for image in stored]
        try:
            longest = max(found, key=lambda x: max(x.shape[1:]) / min(x.shape[1:]))
            patch_map(model, normalize(longest[None].to(device), subject.pixels))
        except torch.OutOfMemoryError as error:
            raise UserError(f"an image of {side} px is too large for {device}: use a smaller --size.") from error
        except _REFUSALS as error:
            refused = (str(error).splitlines() or [type(error).__name__])[0]
            continue
        why = f"The shape of images: at {side} px this encoder takes squares alone, so the middle of each is shown."
        return found, why if square else ""
    raise UserError(f"{subject.name} gives no maps of features, at {size} px or at its own {own}: {refused}")


def _masks(out: Panels, maps: Sequence[Float[Tensor, "_h _w e"]], settings: Settings) -> list[Bool[Tensor, "_h _w"]]:
    if not settings.mask:
        return []
    found = pca.foreground(maps, settings.threshold)
    if found.why_not:
        out.left_out.append(f"Foreground: none can be told, since {found.why_not}.")
        return []
    share = float(torch.cat([mask.flatten() for mask in found.masks]).float().mean())
    how = "Otsu's threshold" if settings.threshold is None else "the threshold that was given"
    out.said["foreground"] = (
        f"Foreground is where the first component of all images, scaled to 0..1 so that their border is low, exceeds "
        f"{found.threshold:.2f} ({how}): {share:.0%} of all places."
    )
    return found.masks


# -- what is said below them


def _sizes(inputs: Sequence[Real[Tensor, "_c _h _w"]]) -> str:
    sizes = sorted({(x.shape[2], x.shape[1]) for x in inputs})
    shown = [f"{width} x {height}" for width, height in sizes]
    return ", ".join(shown) if len(shown) <= 3 else f"{shown[0]} to {shown[-1]}"


def _say_maps(
    out: Panels, maps: Sequence[Float[Tensor, "_h _w e"]], finer: int, found: pca.Components, at: str
) -> None:
    grids = sorted({(x.shape[1], x.shape[0]) for x in maps})
    grid = " to ".join(f"{width} x {height}" for width, height in dict.fromkeys((grids[0], grids[-1])))
    made = f", {finer} times finer than its patches: the image was moved by parts of one" if finer > 1 else ""
    out.said["maps"] = (
        f"Features of the last layer, images of {at} px, maps of {grid} places{made}. Of the variance over all images the "
        f"three components hold {', '.join(f'{share:.0%}' for share in found.shares)}; each is scaled between its 2nd and "
        "98th percentile."
    )
    if not found.varies:
        out.said["maps"] += " All places have the same features: this encoder has collapsed."


def _say_attention(out: Panels, attention: Sequence[Attention], at: str, pooled_by_it: bool) -> None:
    on_prefix = float(torch.stack([one.prefix.sum(-1).mean() for one in attention]).mean())
    registers = attention[0].prefix.shape[-1] - 1
    on = f"itself and {registers} registers" if registers else "itself"
    out.said["attention"] = (
        f"Last block, {attention[0].patches.shape[1]} heads, images of {at} px. The class token gives {on_prefix:.1%} of "
        f"its attention to {on}, which is not drawn. Every map is scaled from its smallest to its largest value; "
        "the number is how many times their mean the largest is: near 1, attention is even."
    )
    if not pooled_by_it:
        out.said["attention"] += " The features of this encoder are not those of its class token."
