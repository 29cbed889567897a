"""What the pixels of shards are: the values they are stored with, and each channel's mean and standard deviation once a
range says what is black and what is white."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float64, Shaped

from lejepa_scale.data.faults import Fault, SampleFault
from lejepa_scale.data.folders import shards_of
from lejepa_scale.data.images.decode import stored
from lejepa_scale.data.images.pixels import Pixels, scaled
from lejepa_scale.data.index.keys import SampleKeys
from lejepa_scale.data.index.shards import index_shards
from lejepa_scale.data.io.reader import Reader
from lejepa_scale.data.samples import read_image
from lejepa_scale.errors import UserError
from lejepa_scale.progress import bar

logger = logging.getLogger(__name__)
QUANTILES = 0.001, 0.5, 0.999
_PIXELS_OF_AN_IMAGE = 1024  # for the quantiles


@dataclass
class Moments:
    """Count, mean and sum of squared differences to it, of each channel; images are added one by one (Chan, Golub and
    LeVeque 1979), so that nothing is lost where the mean is far from 0."""

    count: int = 0
    mean: Float64[np.ndarray, " c"] = field(default_factory=lambda: np.zeros(1))
    squares: Float64[np.ndarray, " c"] = field(default_factory=lambda: np.zeros(1))

    def add(self, rows: Float64[np.ndarray, "n c"]) -> None:
        """The pixels of one image."""
        n, mean = len(rows), rows.mean(0)
        total, apart = self.count + n, mean - self.mean
        self.squares = self.squares + ((rows - mean) ** 2).sum(0) + apart**2 * (self.count * n / total)
        self.mean = self.mean + apart * (n / total)
        self.count = total

    @property
    def std(self) -> Float64[np.ndarray, " c"]:
        """Of the pixels that were seen."""
        return np.sqrt(self.squares / self.count)


@dataclass(frozen=True)
class Statistics:
    """Of the images that were read. low, high and quantiles [3, C] (QUANTILES) are in stored units; mean and std are shares
    of the range, or None where neither 8 bits nor a range say what values mean; clipped: the share of values beyond it."""

    images: int
    of: int
    kinds: list[str]  # NumPy's names
    low: Float64[np.ndarray, " c"]
    high: Float64[np.ndarray, " c"]
    quantiles: Float64[np.ndarray, "3 c"]
    mean: Float64[np.ndarray, " c"] | None
    std: Float64[np.ndarray, " c"] | None
    clipped: float

    @property
    def bits(self) -> int | None:
        """That the largest value needs; None for values below 0 or that are not whole."""
        whole = all(kind.startswith("uint") for kind in self.kinds)
        return max(8, int(self.high.max()).bit_length()) if whole else None


def pixel_statistics(shards: Sequence[str], pixels: Pixels, *, images: int = 1000, image_key: str = "") -> Statistics:
    """Statistics of up to `images` images, evenly spaced over the shards; image_key as of a source in the configuration.
    Images that cannot be used are named and left out. Raises UserError where a shard is missing or damaged, or no image can
    be used."""
    reader, rng = Reader(), np.random.default_rng(0)
    indexed = index_shards(shards_of(shards), keys=SampleKeys.parsed(image_key, "cls"), reader=reader)
    ends = np.cumsum(indexed.counts)
    total = int(ends[-1])
    chosen = np.unique(np.linspace(0, total - 1, min(images, total)).round().astype(int))
    moments, kinds, few, clipped, reason = Moments(), set[str](), [], 0, ""
    low, high = np.full(pixels.channels, np.inf), np.full(pixels.channels, -np.inf)
    for number in bar("reading images", chosen, unit="image"):
        part = int(np.searchsorted(ends, number, side="right"))
        shard = indexed[part]
        member = int(number - (ends[part] - len(shard)))
        try:
            image = stored(read_image(reader, shard, member), pixels=pixels)
            meant = _share_of_range(image, pixels)
        except SampleFault as error:
            reason = str(Fault(shard.url, shard.key(member), int(shard.offsets[member]), str(error)))
            logger.warning("left out: %s", reason)
            continue
        rows = image.reshape(-1, pixels.channels)
        kinds.add(str(rows.dtype))
        low, high = np.minimum(low, rows.min(0)), np.maximum(high, rows.max(0))
        few.append(rows[rng.integers(len(rows), size=_PIXELS_OF_AN_IMAGE)].astype(np.float64))
        if meant is not None:
            moments.add(meant)
        if pixels.range is not None:
            below, above = pixels.bounds
            clipped += int(((rows < below) | (rows > above)).sum())
    if not few:
        raise UserError(f"none of {len(chosen)} images can be used; {reason}.")
    known = moments.count > 0
    return Statistics(
        images=len(few),
        of=total,
        kinds=sorted(kinds),
        low=low,
        high=high,
        quantiles=np.quantile(np.concatenate(few), QUANTILES, axis=0),
        mean=moments.mean if known else None,
        std=moments.std if known else None,
        clipped=clipped / (moments.count * pixels.channels) if known else 0.0,
    )


def _share_of_range(image: Shaped[np.ndarray, "h w c"], pixels: Pixels) -> Float64[np.ndarray, "n c"] | None:
    if pixels.range is None and image.dtype != np.uint8:
        return None
    return scaled(image, pixels).reshape(-1, pixels.channels).astype(np.float64) / 255
