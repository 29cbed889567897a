"""An encoder as a picture: what its patches see, what its class token attends to, which images are alike to it, how many
directions its features use, and the curves of its run. A page or one figure: matplotlib is imported here alone, for the
latter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from lejepa_scale.checkpoint import Weights
from lejepa_scale.checkpoint.places import Place
from lejepa_scale.conversion import Given
from lejepa_scale.data.images.pixels import Ranges
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.pictures.gather import panels
from lejepa_scale.evaluation.pictures.images import Images, overlaid
from lejepa_scale.evaluation.pictures.page import page
from lejepa_scale.evaluation.pictures.panels import Panels, Settings, Shown
from lejepa_scale.evaluation.subjects import subjects
from lejepa_scale.evaluation.suite import device_of, indexed, keys_of_subject

_FIGURES = (".png", ".pdf", ".svg")
_DOTS = 150  # an inch
_TILE = 1.35  # inches
_COLOURS = {"main": "#c2410c", "other": "#9a968c", True: "#2f8f4e", False: "#cc3d33"}


def draw(
    what: str | Place,
    shards: str | Sequence[str],
    out: Path,
    *,
    settings: Settings | None = None,
    weights: Weights = "best",
    given: Given | None = None,
    image_size: int | None = None,
    value_range: Ranges | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
    device: torch.device | str | None = None,
    command: str = "",
) -> Panels:
    """Write the picture of an encoder with some of the images in `shards`: a page for .html, one figure for .png, .pdf and
    .svg. Returns what it shows, and why other panels are not there.

    what: a run or checkpoint, an export, a folder of timm's or transformers', timm:NAME, or a file of weights with
    `given.encoder`. shards: shards, or a folder of images; labels are shown where there are some. weights: of a run, as
    `load_encoder` takes them. image_size: side in pixels of the squares that neighbours and the spectrum are of; unset, the
    encoder's own. value_range, image_key, label_key: of these images; unset, those of the encoder's run. command: said at
    the end of a page.

    Raises UserError for another ending, where matplotlib is absent and a figure is asked for, for what is no encoder, for no
    images, and for features that are not finite.
    """
    kind = out.suffix.lower()
    if kind not in (".html", *_FIGURES):
        raise UserError(f"--out {out}: a picture is a page (.html) or a figure ({', '.join(_FIGURES)}).")
    pyplot = None if kind == ".html" else _pyplot()
    where = device_of(device)
    (subject,) = subjects(
        what, given=given, weights=weights, image_size=image_size, value_range=value_range, beside=False
    )
    sets, numbers = indexed({"images": shards}, keys_of_subject(subject, image_key, label_key))
    images = Images(sets["images"], numbers, subject.pixels)
    found = panels(subject, what, images, settings or Settings(), where)
    out.parent.mkdir(parents=True, exist_ok=True)
    if pyplot is None:
        out.write_text(page(found, command), encoding="utf-8")
    else:
        figure = _figure(pyplot, found)
        figure.savefig(out, dpi=_DOTS)
        pyplot.close(figure)
    return found


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(
            "a picture needs matplotlib: pip install 'lejepa_scale[report]'; a page does not: --out NAME.html."
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


# -- the figure


def _figure(pyplot: Any, found: Panels) -> Any:
    """Images with their maps above, a column for each; neighbours, the spectrum and curves below."""
    rows = _map_rows(found.images)
    shapes = [image.image.shape[1] / image.image.shape[0] for image in found.images]
    above = _TILE * len(rows) + 0.5
    lower = [
        name for name, there in (("rows", found.rows), ("spectrum", found.spectrum), ("curves", found.curves)) if there
    ]
    below = 0.62 * len(found.rows) + 0.6 if found.rows else 3.0 if lower else 0.0
    below = max(below, 4.4 if found.curves else below)
    width = max(_TILE * sum(shapes) + 1.2, 11.0 if lower else 4.0)
    figure = pyplot.figure(figsize=(width, above + below), layout="constrained")
    figure.suptitle(found.title, x=0.01, ha="left", fontsize="large", fontweight="bold")
    parts = figure.subfigures(2 if lower else 1, 1, height_ratios=[above, below] if lower else [1], squeeze=False)[:, 0]
    _draw_maps(parts[0], rows, shapes)
    if lower:
        widths = {"rows": 4.2, "spectrum": 3.4, "curves": 3.4}
        places = parts[1].subfigures(1, len(lower), width_ratios=[widths[name] for name in lower], squeeze=False)[0]
        for name, place in zip(lower, places, strict=True):
            {"rows": _draw_neighbours, "spectrum": _draw_spectrum, "curves": _draw_curves}[name](place, found)
    return figure


def _map_rows(images: Sequence[Shown]) -> list[tuple[str, list[Any]]]:
    """Names and pictures of every kind that there is."""
    rows: list[tuple[str, list[Any]]] = [("image", [one.image for one in images])]
    for name, maps in (
        ("PCA, all images", [one.shared for one in images]),
        ("PCA, this image", [one.own for one in images]),
        ("foreground", [one.foreground for one in images]),
    ):
        if all(map_ is not None for map_ in maps):
            rows.append((name, [_enlarged(m, one.image.shape) for m, one in zip(maps, images, strict=True)]))
    if all(one.heads is not None for one in images):
        rows.append(("attention", [overlaid(one.image, one.heads.mean(0)) for one in images]))  # type: ignore[union-attr]
    return rows


def _enlarged(colours: Any, shape: Sequence[int]) -> Any:
    """To the size of the image; the background dark."""
    large = cv2.resize(np.nan_to_num(colours, nan=0.08), (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)
    return large.clip(0, 1)


def _draw_maps(figure: Any, rows: Sequence[tuple[str, list[Any]]], shapes: Sequence[float]) -> None:
    axes = figure.subplots(len(rows), len(shapes), squeeze=False, width_ratios=shapes)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for (name, pictures), line in zip(rows, axes, strict=True):
        line[0].set_ylabel(name, fontsize="small")
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture)


def _draw_neighbours(figure: Any, found: Panels) -> None:
    figure.suptitle("nearest neighbours by cosine", fontsize="medium")
    most = max(len(row) for row in found.rows)
    axes = figure.subplots(len(found.rows), most, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for row, line in zip(found.rows, axes, strict=True):
        for i, (one, axis) in enumerate(zip(row, line[: len(row)], strict=True)):
            axis.imshow(one.image)
            axis.set_title(f"{one.cosine:.2f}" if i else "query", fontsize=6, pad=1)
            if one.right is not None:
                axis.spines[:].set(visible=True, color=_COLOURS[one.right], linewidth=2)


def _draw_spectrum(figure: Any, found: Panels) -> None:
    shown = found.spectrum
    assert shown is not None
    axis = figure.subplots()
    floor = max(shown.shares[0], shown.of_gaussian[0]) * 1e-8
    for name, values, kind in (("isotropic Gaussian", shown.of_gaussian, "other"), ("features", shown.shares, "main")):
        axis.plot(range(1, len(values) + 1), np.maximum(values, floor), color=_COLOURS[kind], label=name)
    axis.set(yscale="log", xlabel="number of the eigenvalue", ylabel="share of the variance")
    axis.set_title(f"effective rank {shown.effective_rank:.1f} of {shown.rank_of_gaussian:.1f}", fontsize="medium")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", frameon=False)


def _draw_curves(figure: Any, found: Panels) -> None:
    axes = figure.subplots(len(found.curves[:3]), 1, sharex=True, squeeze=False)[:, 0]
    for curve, axis in zip(found.curves[:3], axes, strict=True):
        axis.plot(curve.steps, curve.values, color=_COLOURS["main"], marker="o" if len(curve.steps) == 1 else "")
        axis.set_ylabel(curve.title, fontsize="small")
        axis.grid(alpha=0.3)
        if curve.logarithmic:
            axis.set_yscale("log")
    axes[-1].set_xlabel("step")
