"""lejepa picture: an encoder at a glance."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from lejepa_scale.cli.command import Command, add_keys, add_range, add_weights, expect_writable, positive, ranges

_DESCRIPTION = """  lejepa picture runs/quickstart --shards data/scenes/test --out picture.html
  lejepa picture timm:vit_small_patch14_dinov2 --shards photos/ --out dinov2.html --images 12
  lejepa picture runs/a/checkpoints/step_00001000 --shards SHARDS --out picture.png --threshold 0.6

What the patches of some images are to an encoder (principal components of their features as colours, for all images
together, for each alone, and for the foreground), what the class token attends to, the nearest neighbours of these images,
the spectrum of the features, and the curves of a run. WHAT is as for `lejepa evaluate`: a run or checkpoint, an export, a
folder of timm's or transformers', timm:NAME, or a file of weights with --encoder NAME. An .html file is one page that needs
nothing else; .png, .pdf and .svg are one figure. Panels that an encoder cannot have are left out, and the reason is said."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="WHAT", help="an encoder: see above")
    parser.add_argument("--shards", nargs="+", required=True, help="shards (folder, files, brace patterns) or images")
    parser.add_argument("--out", type=Path, required=True, help="an .html, .png, .pdf or .svg file")
    parser.add_argument("--images", type=positive, default=8, help="how many are shown; %(default)s")
    parser.add_argument(
        "--size", type=positive,
        help="of an image's shorter side in pixels, its shape is kept; default: twice the encoder's own, at most 448",
    )  # fmt: skip
    parser.add_argument(
        "--sample", type=positive, default=500,
        help="images, drawn at random, that neighbours and the spectrum are of; %(default)s",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the draw; %(default)s")
    parser.add_argument("--threshold", type=float, help="of the foreground, 0 to 1; default: Otsu's")
    parser.add_argument("--no-mask", action="store_true", help="look for no foreground")
    parser.add_argument(
        "--finer", type=positive, metavar="N",
        help="maps N times finer than patches, by N x N passes over moved images; default: 28 places a side at least",
    )  # fmt: skip
    parser.add_argument("--encoder", help="timm's name of the model that a file of weights is for")
    parser.add_argument(
        "--image-size", type=positive, help="for neighbours and the spectrum; default: the encoder's own"
    )
    parser.add_argument("--batch", type=positive, default=64)
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    add_weights(parser)
    add_range(parser, "that of the encoder's run")
    add_keys(parser, "those of the encoder's run")


def _run(a: argparse.Namespace) -> int:
    from lejepa_scale.conversion import Given
    from lejepa_scale.evaluation.picture import Settings, draw

    expect_writable(a.out)
    settings = Settings(
        images=a.images,
        size=a.size,
        sample=a.sample,
        mask=not a.no_mask,
        threshold=a.threshold,
        finer=a.finer,
        seed=a.seed,
        batch=a.batch,
    )
    found = draw(
        a.what,
        a.shards,
        a.out,
        settings=settings,
        weights=a.weights,
        given=Given(a.encoder, a.image_size),
        image_size=a.image_size,
        value_range=ranges(a.range),
        image_key=a.image_key,
        label_key=a.label_key,
        device=a.device,
        command=shlex.join(["lejepa", "picture", *sys.argv[2:]]),
    )
    for reason in found.left_out:
        print(f"not shown: {reason}")
    print(f"{'page' if a.out.suffix.lower() == '.html' else 'picture'}: {a.out}")
    return 0


COMMAND = Command("picture", "show what an encoder sees, on one page", _DESCRIPTION, _add_arguments, _run)
