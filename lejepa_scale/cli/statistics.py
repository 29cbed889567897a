"""lejepa shards statistics: what the pixels of shards are, and what to write into a configuration for them."""

from __future__ import annotations

import argparse
from typing import Any

from lejepa_scale.cli.command import Command, add_keys, add_range, positive, ranges

_DESCRIPTION = """  lejepa shards statistics data/photos
  lejepa shards statistics data/sentinel2 --channels 13
  lejepa shards statistics data/sentinel2 --channels 13 --range 0 10000

For images with other bands than red, green and blue, or more than 8 bits. Prints the values that the images are stored with;
choose a range by them, and repeat the command with it: it then prints data.mean and data.std, as shares of that range."""

_MUCH = 0.1  # of the values clipped
_CONSTANT = 1e-6  # of the range: a standard deviation below it is that of rounding


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+", help="tar files, folders, URLs; braces allowed")
    parser.add_argument("--channels", type=positive, default=3, help="bands of an image (default 3)")
    add_range(parser, "none, which 8-bit images do not need")
    add_keys(parser, "any image's", label=False)
    parser.add_argument("--images", type=positive, default=1000, help="how many are read, evenly spaced (default 1000)")


def _run(a: argparse.Namespace) -> int:
    from lejepa_scale.data import Pixels
    from lejepa_scale.data.statistics import QUANTILES, pixel_statistics

    found = pixel_statistics(
        a.shards, Pixels(a.channels, ranges(a.range)), images=a.images, image_key=a.image_key or ""
    )
    print(f"{found.images:,} of {found.of:,} images; stored values: {', '.join(found.kinds)}")
    names = ("channel", "least", *(f"{share:.1%}" for share in QUANTILES), "largest")
    print("".join(f"{name:>12}" for name in names))
    for channel, row in enumerate(zip(found.low, *found.quantiles, found.high, strict=True)):
        print(f"{channel:>12}" + "".join(f"{value:>12.6g}" for value in row))
    print("\n".join(_advice(found, a)))
    return 0


def _advice(found: Any, a: argparse.Namespace) -> list[str]:
    """Of data.statistics.Statistics, which are imported once there is work."""
    import numpy as np

    if found.mean is None or found.std is None:
        low, high = found.quantiles[0].min(), found.quantiles[-1].max()
        lines = [f"repeat with --range {low:g} {high:g} (99.8 % of the values)"]
        if found.bits is not None:
            lines.append(f"       or --range 0 {2**found.bits - 1} (all of {found.bits} bits)")
        return ["nothing says which of these values are black and white:", *lines]
    lines = []
    if a.range is not None:
        doubt = ": is this range meant?" if found.clipped > _MUCH else ""
        lines.append(f"{found.clipped:.2%} of the values lie beyond the range and are clipped to it{doubt}")
        pairs = ", ".join(f"[{low:g}, {high:g}]" for low, high in ranges(a.range) or ())
        pairs = f"[{pairs}]" if len(a.range) > 2 else pairs
        lines.append(f"data.shards=[{{shards: [{', '.join(a.shards)}], range: {pairs}}}]")
    for channel in np.flatnonzero(found.std < _CONSTANT):
        lines.append(
            f"channel {channel} has one value in all of these images, {found.mean[channel]:.4g} of the range, and tells "
            "nothing: leave it out of them if you can; its data.std is written as 1"
        )
    std = np.where(found.std < _CONSTANT, 1, found.std)
    means, stds = (", ".join(f"{value:.4g}" for value in values) for values in (found.mean, std))
    return [*lines, f"data.channels={a.channels}", f"data.mean=[{means}]", f"data.std=[{stds}]"]


COMMAND = Command("statistics", "say what the pixels of shards are", _DESCRIPTION, _add_arguments, _run)
