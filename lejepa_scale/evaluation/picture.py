"""A run as a picture: its loss curves, and what its patches see (PCA of patch features as colours). matplotlib is imported
here alone, when it draws."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lejepa_scale.checkpoint import Weights, load_encoder
from lejepa_scale.data import evaluation_batches
from lejepa_scale.data.folders import shards_of
from lejepa_scale.data.images.photometric import normalize
from lejepa_scale.data.images.pixels import Ranges, of_run
from lejepa_scale.data.index.keys import keys_of_run
from lejepa_scale.data.index.shards import index_shards
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.pca import dense_features, pca_maps

_SHIFTS = 4  # maps are this many times finer than the encoder's patches


def draw(
    run: Path,
    shards: str | Sequence[str],
    out: Path,
    *,
    images: int = 8,
    size: int | None = None,
    weights: Weights = "best",
    value_range: Ranges | None = None,
    image_key: str | None = None,
) -> None:
    """Write the picture of a run directory with the first `images` of the shards.

    size: side in pixels; unset, twice the training size. weights: as `load_encoder` takes them. value_range, image_key: of
    these images; unset, those of the run's own. Of three and more channels the first three are shown, of others the
    first. Raises UserError for what is no run directory, and where matplotlib is absent.
    """
    pyplot = _pyplot()
    metrics = run / "metrics.jsonl"
    if not metrics.exists():
        raise UserError(f"{run} is not a run directory: it has no metrics.jsonl.")
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    encoder, config = load_encoder(run, weights=weights)
    side = size or 2 * config.image_size
    indexed = index_shards(shards_of(shards), keys=keys_of_run(config.data, image_key))
    pixels = of_run(config.data, value_range)
    batches = evaluation_batches(indexed, image_size=side, batch_size=images, limit=images, pixels=pixels)
    pictures, _ = next(iter(batches))
    maps = pca_maps(dense_features(encoder, normalize(pictures, pixels), _SHIFTS))

    columns = math.ceil(len(pictures) / 2)
    figure = pyplot.figure(figsize=(6 + 1.5 * columns, 6), layout="constrained")
    left, right = list(figure.subfigures(1, 2, width_ratios=[6, 1.5 * columns]))
    _curves(left, records)
    right.suptitle("images, and the first three principal components of their patch features", fontsize="medium")
    axes = right.subplots(4, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, (picture, colours) in enumerate(zip(pictures, maps, strict=True)):
        row, column = 2 * (i // columns), i % columns
        shown = picture[:3] if pixels.channels >= 3 else picture[:1].expand(3, -1, -1)
        axes[row, column].imshow(shown.permute(1, 2, 0).to(torch.uint8))
        axes[row + 1, column].imshow(colours, interpolation="bicubic")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("a picture needs matplotlib: pip install 'lejepa_scale[report]'.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _curves(figure: Any, records: list[dict[str, float]]) -> None:
    names = (("loss", "loss"), ("loss_prediction", "prediction"), ("loss_sigreg", "SIGReg"))
    for (key, label), axis in zip(names, figure.subplots(3, 1, sharex=True), strict=True):
        axis.plot([r["step"] for r in records], [r[key] for r in records], linewidth=1.5)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if key != "loss_prediction":
            axis.set_yscale("log")
    axis.set_xlabel("step")
