"""What is read and written: images, their order, features, exports."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from benchmarks import conversion, evaluation, input, order
from benchmarks.kinds.kind import Kinds
from benchmarks.measure import Results, run_sections

_TEST_DATA = Path(os.environ.get("LEJEPA_TEST_DATA") or Path(__file__).parents[4] / "shared/data")
_PHOTOS = _TEST_DATA / "imagenet_sample.tar"


def register(kinds: Kinds) -> None:
    """The kinds of this file."""
    for name, run, text in (
        ("input", _input, "decoding, crops and colours on one core, loader memory"),
        ("evaluation", _evaluation, "images/s of the feature pass against a DataLoader, time and memory of k-NN"),
    ):
        kind = kinds.add(name, run=run, help=text)
        kind.add_argument(
            "--photos",
            type=Path,
            default=_PHOTOS,
            help="a plain tar of photographs; default: %(default)s (LEJEPA_TEST_DATA)",
        )
    kinds.add("order", run=_order, help="start, look-up and memory of a billion samples; on the CPU")
    kind = kinds.add("convert", run=_convert, help="which encoder can become what, how exactly, at what cost")
    kind.add_argument(
        "--source", type=Path, help="what `lejepa convert` costs of this checkpoint, in place of the table"
    )
    kind.add_argument(
        "--to", nargs="+", default=["timm", "hf", "safetensors"], help="targets, as 'safetensors --dtype bf16'"
    )


def _input(arguments: argparse.Namespace) -> Results:
    return input.measure(input.TOY if arguments.smoke else input.FULL, arguments.photos)


def _evaluation(arguments: argparse.Namespace) -> Results:
    sizes = evaluation.TOY if arguments.smoke else evaluation.FULL
    return evaluation.measure(sizes, arguments.photos)


def _order(arguments: argparse.Namespace) -> Results:
    samples, shards = (10**6, 1000) if arguments.smoke else (10**9, 100_000)
    sections = {"scale": order.scale(samples, shards), "mixing": order.mixing(100 if arguments.smoke else 1000)}
    return run_sections(sections, torch.device("cpu"), minutes=10)


def _convert(arguments: argparse.Namespace) -> Results:
    if arguments.source is not None:
        sections = {"costs": conversion.costs(arguments.source, arguments.to)}
    else:
        sections = {"table": conversion.table(2 if arguments.smoke else None)}
    return run_sections(sections, torch.device("cpu"), minutes=1e6)
