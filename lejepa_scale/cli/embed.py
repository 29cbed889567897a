"""lejepa embed: features of images, for use elsewhere."""

from __future__ import annotations

import argparse
from pathlib import Path

from lejepa_scale.cli.command import Command, expect_writable, ranges
from lejepa_scale.cli.encoders import add_encoders, cache_of, ranks_of_a_launcher

_DESCRIPTION = """  lejepa embed runs/quickstart --images data/scenes/test --out features.safetensors
  lejepa embed timm:vit_small_patch14_dinov2 --images photos/ --features cls patches --out features.parquet

Encodes every image, in stored order. WHAT is as for `lejepa evaluate`: a run, an export, a folder of timm's or
transformers', timm:NAME, or a file of weights with --encoder NAME. A .safetensors file holds a tensor for each kind of
features, `labels` (-1: none), and in `keys` the samples' names, a line each as bytes (UTF-8); a .parquet file a row for each
image, with columns key, label and one list for each kind."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="WHAT", help="an encoder: see above")
    parser.add_argument("--images", nargs="+", required=True, help="shards (folder, files, brace patterns) or images")
    parser.add_argument("--out", type=Path, required=True, help="a .safetensors or .parquet file")
    parser.add_argument("--overwrite", action="store_true", help="replace it if it is there")
    add_encoders(parser)


def _run(a: argparse.Namespace) -> int:
    from lejepa_scale.conversion import Given
    from lejepa_scale.evaluation.embed import check_target, embed, write
    from lejepa_scale.parallel.process_group import rank

    check_target(a.out, a.overwrite)
    expect_writable(a.out)
    with ranks_of_a_launcher() as device:
        found = embed(
            a.what,
            a.images,
            kinds=a.features,
            batch=a.batch,
            device=a.device or device,
            image_size=a.image_size,
            given=Given(a.encoder, a.image_size),
            weights=a.weights or "best",
            value_range=ranges(a.range),
            image_key=a.image_key,
            label_key=a.label_key,
            cache=cache_of(a),
        )
        if rank() == 0:
            write(found, a.out)
            shapes = ", ".join(f"{kind} {rows.shape[1]}" for kind, rows in found.rows.items())
            print(f"features of {len(found.keys):,} images ({shapes}): {a.out}")
    return 0


COMMAND = Command("embed", "write features of images, for use elsewhere", _DESCRIPTION, _add_arguments, _run)
