"""Write WebDataset tar shards for training.

  python tools/make_shards.py synthetic --out data/scenes --count 8000 --size 48 --seed 0
  python tools/make_shards.py folder photos/ --out data/photos
  python tools/make_shards.py tar cifar10.tar --prefix train/ --out data/cifar10/train
  python tools/make_shards.py torchvision CIFAR10 --root downloads --split train --download --out data/cifar10/train
  python tools/make_shards.py huggingface NAME --split train --out data/NAME

Images that are encoded already keep their bytes. Sources in folders are shuffled before they are cut into shards
(--shuffle SEED), since shards sorted by class make poor batches. Repeating a finished command does nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lejepa_scale.data.make import sources
from lejepa_scale.data.make.writer import is_written, write_shards
from lejepa_scale.errors import UserError


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, required=True, help="folder for the shards")
    common.add_argument("--per-shard", type=int, default=1000, help="images per shard (default 1000)")
    common.add_argument("--overwrite", action="store_true", help="replace another dataset in --out")
    encoded = argparse.ArgumentParser(add_help=False)
    encoded.add_argument("--format", choices=["jpg", "png"], default="jpg", help="for images that are not encoded yet")
    encoded.add_argument("--quality", type=int, default=92, help="of jpg (default 92)")
    listed = argparse.ArgumentParser(add_help=False)
    listed.add_argument(
        "--shuffle", type=int, default=0, metavar="SEED", help="order before sharding; -1 keeps it sorted"
    )
    listed.add_argument("--no-labels", action="store_true", help="ignore the folders that images lie in")

    kind = kinds.add_parser("synthetic", parents=[common, encoded], help="rendered scenes; the class is a shape")
    kind.add_argument("--count", type=int, required=True)
    kind.add_argument("--size", type=int, default=64, help="side in pixels")
    kind.add_argument("--seed", type=int, default=0)
    kind = kinds.add_parser("folder", parents=[common, listed], help="a folder of images, classes as sub-folders")
    kind.add_argument("source", type=Path)
    kind = kinds.add_parser("tar", parents=[common, listed], help="a plain tar of such a folder")
    kind.add_argument("source", type=Path)
    kind.add_argument("--prefix", default="", help="take members below this path, e.g. train/")
    kind = kinds.add_parser("torchvision", parents=[common, encoded], help="a torchvision dataset")
    kind.add_argument("name", help="class in torchvision.datasets")
    kind.add_argument("--root", type=Path, default=Path("data/torchvision"))
    kind.add_argument("--split", help="train, test, val, ...")
    kind.add_argument("--download", action="store_true")
    kind = kinds.add_parser("huggingface", parents=[common, encoded], help="a Hugging Face dataset, local or hub")
    kind.add_argument("name")
    kind.add_argument("--split", default="train")
    kind.add_argument("--image-key", default="image")
    kind.add_argument("--label-key", default="label")
    arguments = parser.parse_args()
    if arguments.per_shard < 1 or getattr(arguments, "count", 1) < 1:
        parser.error("--per-shard and --count must be at least 1")
    return arguments


def open_source(a: argparse.Namespace) -> sources.Source:
    if a.kind == "synthetic":
        return sources.scenes(a.count, a.size, a.seed, a.format, a.quality)
    if a.kind == "torchvision":
        return sources.torchvision(a.name, a.root, a.split, a.download, a.format, a.quality)
    if a.kind == "huggingface":
        return sources.huggingface(a.name, a.split, a.image_key, a.label_key, a.format, a.quality)
    shuffle = None if a.shuffle < 0 else a.shuffle
    if a.kind == "folder":
        return sources.folder(a.source, shuffle, not a.no_labels)
    return sources.tar(a.source, a.prefix, shuffle, not a.no_labels)


def main() -> int:
    arguments = parse()
    described = {k: str(v) for k, v in vars(arguments).items() if k not in ("out", "overwrite", "download")}
    try:
        if is_written(arguments.out, described, arguments.overwrite):
            print(f"{arguments.out} holds this dataset already.")
            return 0
        source = open_source(arguments)
        shards = write_shards(
            source.samples,
            arguments.out,
            per_shard=arguments.per_shard,
            total=source.total,
            classes=source.classes,
            description=described,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {len(shards)} shards to {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
