"""What commands share that encode images: arguments, the ranks that a launcher started, where features are kept."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from lejepa_scale.cli.command import add_keys, add_range
from lejepa_scale.config.paths import user_cache
from lejepa_scale.parallel import launch

_TIMEOUT = timedelta(hours=2)  # for the longest protocol of one rank, while the others wait


def add_encoders(parser: argparse.ArgumentParser) -> None:
    """Which features of what images."""
    parser.add_argument(
        "--features", nargs="+", default=["pooled"],
        help="pooled (default), cls, patches, cls+patches; with -N, as cls-4, of the last N blocks",
    )  # fmt: skip
    parser.add_argument("--encoder", help="timm's name of the model that a file of weights is for")
    parser.add_argument("--weights", choices=["trained", "average", "first", "best"], help="of a run, these alone")
    parser.add_argument("--image-size", type=int, help="side in pixels; default: the encoder's own")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--cache", type=Path, help="where features are kept; default: in the user's cache")
    parser.add_argument("--no-cache", action="store_true", help="neither read nor keep features")
    add_range(parser, "that of the encoder's run")
    add_keys(parser, "those of the encoder's run")


def cache_of(a: argparse.Namespace) -> Path | None:
    """The folder that features are kept in."""
    return None if a.no_cache else a.cache or user_cache() / "features"


@contextmanager
def ranks_of_a_launcher() -> Iterator[Any]:
    """Inside, the process group of the ranks that torchrun started; their device. None, and no group, without a launcher."""
    if not launch.launched():
        yield None
        return
    from lejepa_scale.parallel.process_group import joined

    with joined(_TIMEOUT) as device:
        yield device
