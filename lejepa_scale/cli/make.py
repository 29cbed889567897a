"""lejepa shards make: tar shards from the places where images lie."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lejepa_scale.cli.command import Command, Group, positive

Add = Callable[[argparse.ArgumentParser], None]


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--per-shard", type=positive, default=1000, help="images per shard (default 1000)")
    parser.add_argument("--overwrite", action="store_true", help="replace another dataset in --out")


def _encoded(parser: argparse.ArgumentParser, formats: tuple[str, ...] = ("jpg", "png")) -> None:
    parser.add_argument("--format", choices=formats, default="jpg", help="for images that are not encoded yet")
    parser.add_argument("--quality", type=int, default=92, help="of jpg (default 92)")


def _listed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shuffle", type=int, default=0, metavar="SEED", help="order before sharding; -1: stays sorted"
    )
    parser.add_argument("--no-labels", action="store_true", help="ignore the folders that images lie in")


def _synthetic(parser: argparse.ArgumentParser) -> None:
    _encoded(parser, ("jpg", "png", "tif", "npy"))
    parser.add_argument("--channels", type=positive, default=3, help="bands of an image (default 3: RGB)")
    parser.add_argument(
        "--bits", type=int, choices=range(8, 17), default=8, metavar="8..16", help="of a value (default 8)"
    )
    parser.add_argument("--count", type=positive, required=True)
    parser.add_argument("--size", type=positive, default=64, help="side in pixels")
    parser.add_argument("--seed", type=int, default=0)


def _folder(parser: argparse.ArgumentParser) -> None:
    _listed(parser)
    parser.add_argument("source", type=Path)


def _tar(parser: argparse.ArgumentParser) -> None:
    _folder(parser)
    parser.add_argument("--prefix", default="", help="take members below this path, e.g. train/")


def _torchvision(parser: argparse.ArgumentParser) -> None:
    _encoded(parser)
    parser.add_argument("name", help="class in torchvision.datasets")
    parser.add_argument("--root", type=Path, default=Path("data/torchvision"))
    parser.add_argument("--split", help="train, test, val, ...")
    parser.add_argument("--download", action="store_true")


def _huggingface(parser: argparse.ArgumentParser) -> None:
    _encoded(parser)
    parser.add_argument("name")
    parser.add_argument("--split", default="train")
    parser.add_argument("--image-key", default="image")
    parser.add_argument("--label-key", help="column of the labels (default: label, where there is one)")


def _open(kind: str, a: argparse.Namespace) -> Any:
    """A `make.sources.Source`, whose module is imported with the first use."""
    from lejepa_scale.data.make import sources

    if kind == "synthetic":
        return sources.scenes(a.count, a.size, a.seed, a.format, a.quality, a.channels, a.bits)
    if kind == "torchvision":
        return sources.torchvision(a.name, a.root, a.split, a.download, a.format, a.quality)
    if kind == "huggingface":
        return sources.huggingface(a.name, a.split, a.image_key, a.label_key, a.format, a.quality)
    shuffle = None if a.shuffle < 0 else a.shuffle
    if kind == "folder":
        return sources.folder(a.source, shuffle, not a.no_labels)
    return sources.tar(a.source, a.prefix, shuffle, not a.no_labels)


def _write(kind: str, a: argparse.Namespace) -> int:
    from lejepa_scale.data.make.writer import is_written, write_shards

    described = {k: str(v) for k, v in vars(a).items() if k not in ("out", "overwrite", "download")}
    described["kind"] = kind
    if is_written(a.out, described, a.overwrite):
        print(f"{a.out} holds this dataset already.")
        return 0
    source = _open(kind, a)
    shards = write_shards(
        source.samples,
        a.out,
        per_shard=a.per_shard,
        total=source.total,
        classes=source.classes,
        description=described,
    )
    written = json.loads((a.out / "dataset.json").read_text())
    classes = f" of {len(source.classes):,} classes" if source.classes else ""
    print(f"wrote {len(shards):,} shards to {a.out}: {written['count']:,} images{classes}")
    if lines := source.passed.lines():
        print("\n  ".join(["passed over:", *lines]))
    return 0


def _kind(name: str, summary: str, example: str, add: Add) -> Command:
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        _common(parser)
        add(parser)

    return Command(name, summary, f"  lejepa shards make {name} {example}", add_arguments, lambda a: _write(name, a))


COMMAND = Group(
    "make",
    "write tar shards from a folder, a tar, a data set, or rendered scenes",
    """Write WebDataset tar shards for training. Images that are encoded already keep their bytes. Sources in folders are
shuffled before they are cut into shards (--shuffle SEED), since shards sorted by class make poor batches. Repeating a
finished command does nothing.""",
    (
        _kind(
            "synthetic",
            "rendered scenes; the class is a shape",
            "--out data/scenes --count 8000 --size 48 --seed 0",
            _synthetic,
        ),
        _kind("folder", "a folder of images, classes as sub-folders", "photos/ --out data/photos", _folder),
        _kind("tar", "a plain tar of such a folder", "cifar10.tar --prefix train/ --out data/cifar10/train", _tar),
        _kind(
            "torchvision",
            "a torchvision dataset",
            "CIFAR10 --root downloads --split train --download --out data/cifar10/train",
            _torchvision,
        ),
        _kind(
            "huggingface", "a Hugging Face dataset, local or hub", "NAME --split train --out data/NAME", _huggingface
        ),
    ),
)
