"""lejepa picture: a run at a glance."""

from __future__ import annotations

import argparse
from pathlib import Path

from lejepa_scale.cli.command import Command, add_keys, add_range, add_weights, positive, ranges

_DESCRIPTION = """  lejepa picture runs/quickstart --shards data/scenes/test --out picture.png

Its loss curves, and what its patches see: the first principal components of patch features as colours."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--shards", nargs="+", required=True, help="where to take pictures from")
    parser.add_argument("--out", type=Path, required=True, help="PNG, PDF or SVG file")
    parser.add_argument("--images", type=positive, default=8)
    parser.add_argument("--size", type=positive, help="side in pixels; default twice the training size")
    add_weights(parser)
    add_range(parser, "that of the run's shards")
    add_keys(parser, "that of the run's shards", label=False)


def _run(a: argparse.Namespace) -> int:
    from lejepa_scale.evaluation.picture import draw

    draw(
        a.run,
        a.shards,
        a.out,
        images=a.images,
        size=a.size,
        weights=a.weights,
        value_range=ranges(a.range),
        image_key=a.image_key,
    )
    print(f"wrote {a.out}")
    return 0


COMMAND = Command("picture", "draw a run's losses and what its encoder sees", _DESCRIPTION, _add_arguments, _run)
