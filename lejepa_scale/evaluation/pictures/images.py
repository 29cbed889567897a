"""Images of a set for a picture: some at random, always the same; each in its own shape or as a square."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from jaxtyping import Float32, Real, Shaped, UInt8
from torch import Tensor

from lejepa_scale.data import Pixels
from lejepa_scale.data.evaluation import Labelled
from lejepa_scale.data.faults import SampleFault, printable
from lejepa_scale.data.images.decode import decode
from lejepa_scale.data.images.views import centre_square
from lejepa_scale.data.index.classes import ClassNumbers
from lejepa_scale.data.index.scan import ShardIndex
from lejepa_scale.data.index.shards import Shards
from lejepa_scale.data.io.reader import Reader
from lejepa_scale.data.samples import read_image
from lejepa_scale.errors import UserError

logger = logging.getLogger(__name__)
LONGEST = 2.5  # times the shorter side: of a longer image the middle is shown


@dataclass
class Images:
    """The images of `shards`, by their positions in stored order."""

    shards: Shards
    numbers: ClassNumbers
    pixels: Pixels
    reader: Reader = field(default_factory=Reader)

    def __post_init__(self) -> None:
        self._ends = np.cumsum(self.shards.counts)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def drawn(self, count: int, seed: int) -> list[int]:
        """So many positions, without repetition, in random order; all of them where there are no more."""
        return np.random.default_rng(seed).choice(len(self), min(count, len(self)), replace=False).tolist()

    def read(self, position: int) -> Real[np.ndarray, "_h _w _c"]:
        """Values 0..255, in the shape that it is stored in. Raises SampleFault."""
        shard, member = self._at(position)
        return decode(read_image(self.reader, shard, member), pixels=self.pixels)

    def label(self, position: int) -> int:
        """The number of its class; -1 for none."""
        return self.numbers.of(*self._at(position))

    def key(self, position: int) -> str:
        shard, member = self._at(position)
        return printable(shard.key(member))

    def name(self, label: int) -> str:
        """Of a class, as it is stored."""
        return printable(str(self.numbers.labels[label] if self.numbers.labels else label)) if label >= 0 else ""

    def squares(self, positions: list[int], side: int, batch: int, good: list[int]) -> Iterator[Labelled]:
        """Batches as evaluation has them: resized and cut to the centre. The positions of those that can be used are added
        to `good`; the others are named and left out. Raises UserError where none can."""
        waiting, labels, fault = list[Real[np.ndarray, "c s s"]](), list[int](), ""
        for position in positions:
            try:
                square = centre_square(self.read(position), side).transpose(2, 0, 1)
            except SampleFault as error:
                fault = f"{self.key(position)}: {error}"
                logger.warning("left out: %s", fault)
                continue
            good.append(position)
            waiting.append(square)
            labels.append(self.label(position))
            if len(waiting) == batch:
                yield _batch(waiting, labels)
                waiting, labels = [], []
        if waiting:
            yield _batch(waiting, labels)
        if not good:
            raise UserError(
                f"none of the {len(positions)} images that were tried can be used; {fault or 'there is none'}."
            )

    def _at(self, position: int) -> tuple[ShardIndex, int]:
        number = int(np.searchsorted(self._ends, position, side="right"))
        return self.shards[number], position - int(self._ends[number] - self.shards.counts[number])


def _batch(squares: list[Real[np.ndarray, "c s s"]], labels: list[int]) -> Labelled:
    return Labelled(torch.from_numpy(np.stack(squares)), torch.tensor(labels), [""] * len(labels))


def fitted(
    image: Real[np.ndarray, "h w c"], size: int, stride: tuple[int, int], *, square: bool = False
) -> Real[Tensor, "c _h _w"]:
    """The shorter side about `size`, both sides whole numbers of `stride` (height, width), the shape kept as near as that
    allows. Of an image longer than 2.5 times its height or width the middle is taken; of all, if it is to be `square`."""
    longest = 1.0 if square else LONGEST
    height, width = image.shape[:2]
    kept = min(height, round(longest * width)), min(width, round(longest * height))
    top, left = (height - kept[0]) // 2, (width - kept[1]) // 2
    image = image[top : top + kept[0], left : left + kept[1]]
    ratio = size / min(kept)
    sides = tuple(max(1, round(side * ratio / step)) * step for side, step in zip(kept, stride, strict=True))
    planes = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(planes, sides, mode="bilinear", antialias=True)[0]


def shown(image: Real[Tensor, "c h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """As a person sees it: of three and more channels the first three, of others the first."""
    bands = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    return bands.permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()


def heat(values: Shaped[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """0..1 as black, violet, orange, yellow."""
    return cv2.applyColorMap((255 * values.clip(0, 1)).round().astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1].copy()


def stretched(weights: Float32[np.ndarray, "_h _w"]) -> Float32[np.ndarray, "_h _w"]:
    """From the smallest to the largest as 0..1; zeros where all are equal but for rounding."""
    low, high = float(weights.min()), float(weights.max())
    return (weights - low) / (high - low) if high - low > 1e-5 * abs(high) else np.zeros_like(weights)


def overlaid(image: UInt8[np.ndarray, "h w 3"], weights: Float32[np.ndarray, "_h _w"]) -> UInt8[np.ndarray, "h w 3"]:
    """The image in dark grey, and over it what is attended to, `weights` as `stretched` has them."""
    height, width = image.shape[:2]
    large = cv2.resize(stretched(weights), (width, height), interpolation=cv2.INTER_CUBIC)
    strength = large.clip(0, 1)[..., None]
    grey = image.mean(-1, keepdims=True).repeat(3, -1) * 0.45
    mixed = grey * (1 - 0.85 * strength) + heat(strength[..., 0]) * (0.15 + 0.85 * strength)
    return mixed.clip(0, 255).round().astype(np.uint8)
