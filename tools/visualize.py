"""Draw a run: its loss curves, and what its patches see (PCA of patch features as colours).

python tools/visualize.py runs/quickstart --shards data/scenes/test --out picture.png
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from lejepa_scale.checkpoint import load_encoder
from lejepa_scale.data import evaluation_batches
from lejepa_scale.data.images.photometric import normalize
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.pca import dense_features, pca_maps

_SHIFTS = 4  # maps are this many times finer than the encoder's patches


def draw(run: Path, shards: list[str], out: Path, images: int, size: int | None) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = run / "metrics.jsonl"
    if not metrics.exists():
        raise UserError(f"{run} is not a run directory: it has no metrics.jsonl.")
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    encoder, config = load_encoder(run)
    side = size or 2 * config.image_size
    pictures, _ = next(iter(evaluation_batches(shards, image_size=side, batch_size=images, limit=images)))
    maps = pca_maps(dense_features(encoder, normalize(pictures), _SHIFTS))

    columns = math.ceil(len(pictures) / 2)
    figure = pyplot.figure(figsize=(6 + 1.5 * columns, 6), layout="constrained")
    left, right = list(figure.subfigures(1, 2, width_ratios=[6, 1.5 * columns]))  # type: ignore[arg-type, call-overload]
    _curves(left, records)
    right.suptitle("images, and the first three principal components of their patch features", fontsize="medium")
    axes = right.subplots(4, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, (picture, colours) in enumerate(zip(pictures, maps, strict=True)):
        row, column = 2 * (i // columns), i % columns
        axes[row, column].imshow(picture.permute(1, 2, 0))
        axes[row + 1, column].imshow(colours, interpolation="bicubic")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


def _curves(figure: Any, records: list[dict[str, float]]) -> None:
    names = (("loss", "loss"), ("loss_prediction", "prediction"), ("loss_sigreg", "SIGReg"))
    for (key, label), axis in zip(names, figure.subplots(3, 1, sharex=True), strict=True):
        axis.plot([r["step"] for r in records], [r[key] for r in records], linewidth=1.5)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if key != "loss_prediction":
            axis.set_yscale("log")
    axis.set_xlabel("step")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--shards", nargs="+", required=True, help="where to take pictures from")
    parser.add_argument("--out", type=Path, required=True, help="PNG, PDF or SVG file")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--size", type=int, help="side in pixels; default twice the training size")
    a = parser.parse_args()
    try:
        draw(a.run, a.shards, a.out, a.images, a.size)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {a.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
