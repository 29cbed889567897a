"""Labelled images as evaluation takes them: in stored order, or by number."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import tee
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Int, Real
from torch import Tensor

from lejepa_scale.config import Data, ViewGroup
from lejepa_scale.data.faults import Fault, SampleFault
from lejepa_scale.data.folders import shards_of
from lejepa_scale.data.images import views
from lejepa_scale.data.images.decode import decode
from lejepa_scale.data.images.pixels import RGB, Pixels
from lejepa_scale.data.index.classes import ClassNumbers, class_numbers
from lejepa_scale.data.index.scan import NO_IMAGE, ShardIndex
from lejepa_scale.data.index.shards import Shards, index_shards
from lejepa_scale.data.io.reader import Reader
from lejepa_scale.data.samples import read_image
from lejepa_scale.errors import UserError
from lejepa_scale.parallel.threads import cores

logger = logging.getLogger(__name__)
D, T = TypeVar("D"), TypeVar("T")
_MAX_FAULTS: int = Data.model_fields["max_faults"].default


class Labelled(NamedTuple):
    """A batch of images in stored order."""

    images: Real[Tensor, "_b _c _s _s"]  # 0..255: uint8, or float32 where the pixels have a range
    labels: Int[Tensor, " _b"]  # -1 where unknown
    keys: list[str]  # of the samples, by their names in the shards


def evaluation_batches(
    shards: str | list[str] | Shards,
    *,
    image_size: int,
    batch_size: int,
    limit: int | None = None,
    pixels: Pixels = RGB,
    classes: ClassNumbers | None = None,
) -> Iterator[tuple[Real[Tensor, "_b _c _s _s"], Int[Tensor, " _b"]]]:
    """Images and labels of `labelled_batches`, decoded one after another. Raises UserError as it does."""
    for batch in labelled_batches(
        shards, image_size=image_size, batch_size=batch_size, limit=limit, pixels=pixels, classes=classes, threads=1
    ):
        yield batch.images, batch.labels


def labelled_batches(
    shards: str | list[str] | Shards,
    *,
    image_size: int,
    batch_size: int,
    limit: int | None = None,
    pixels: Pixels = RGB,
    classes: ClassNumbers | None = None,
    part: tuple[int, int] = (0, 1),
    threads: int | None = None,
) -> Iterator[Labelled]:
    """Images in stored order, resized and cut to the centre. classes: numbers for the labels of several sets; unset, those
    of these shards. part: (i, n), the i-th of n stretches of all samples. threads: that decode, ahead of what is taken;
    unset, one for each core that this process may use.

    Images that cannot be used are named and left out. Raises UserError where a shard is missing or damaged, or holds none of
    use: after _MAX_FAULTS in a row."""
    if not isinstance(shards, Shards):
        shards = index_shards(shards_of(shards))
    classes = classes or class_numbers([shards])
    places = ((shard, member, None) for shard, member in part_of_samples(shards, part))

    def read(shard: ShardIndex, member: int) -> bytes:
        return read_image(reader, shard, member)

    def prepared(data: bytes, _: None) -> Real[np.ndarray, "c s s"]:
        return _centred(data, image_size, pixels)

    reader, faults = Reader(), Faults()
    images: list[Real[np.ndarray, "c s s"]] = []
    labels: list[int] = []
    keys: list[str] = []
    for shard, member, image in decoded(places, read, prepared, threads):
        if not faults.usable(shard, member, image):
            continue
        images.append(image)
        labels.append(classes.of(shard, member))
        keys.append(shard.key(member))
        if limit is not None:
            limit -= 1
        if len(images) == batch_size or limit == 0:
            yield Labelled(torch.from_numpy(np.stack(images)), torch.tensor(labels), keys)
            images, labels, keys = [], [], []
        if limit == 0:
            return
    if images:
        yield Labelled(torch.from_numpy(np.stack(images)), torch.tensor(labels), keys)


@dataclass(frozen=True)
class RandomCrop:
    """Random resized crops (area uniform in `scale`) and horizontal flips, the same in any process."""

    scale: tuple[float, float] = (0.35, 1.0)
    flip: float = 0.5
    seed: int = 0

    def __call__(
        self, image: Real[np.ndarray, "h w c"], size: int, visit: int, row: int
    ) -> Real[np.ndarray, "c {size} {size}"]:
        """That of a row, at the visit of that number."""
        draws = np.random.default_rng((self.seed, visit, row)).random(views.DRAWS + 1)
        (view,) = views.cut_views(image, ViewGroup(count=1, size=size, scale=self.scale), draws[None, 1:])
        return (view.flip(-1) if draws[0] < self.flip else view).numpy()


class Samples:
    """Labelled images by number, in any order, as training takes them. Raises UserError where there are none."""

    def __init__(
        self,
        shards: Shards,
        classes: ClassNumbers,
        *,
        image_size: int,
        pixels: Pixels = RGB,
        threads: int | None = None,
    ) -> None:
        self.image_size, self.pixels, self.threads = image_size, pixels, threads
        self._shards, self._reader = shards, Reader()
        places, labels = [np.zeros((0, 2), np.int64)], list[int]()
        for number, shard in enumerate(shards):
            (members,) = np.nonzero(shard.sizes != NO_IMAGE)
            places.append(np.stack([np.full_like(members, number), members], 1))
            labels += [classes.of(shard, int(member)) for member in members]
        self._places = np.concatenate(places)
        self.labels = torch.tensor(labels, dtype=torch.long)  # -1 where unknown
        if not labels:
            raise UserError("the training shards hold no images.")

    def batches(
        self, rows: Iterable[Int[Tensor, " _b"]], crop: RandomCrop | None = None
    ) -> Iterator[tuple[Real[Tensor, "_k _c _s _s"], Int[Tensor, " _k"]]]:
        """For each batch of rows the images that can be used, and which of the rows they are of; those of the next batches
        are decoded meanwhile. crop: of the n-th batch its n-th visit; None: the centre. Raises UserError as
        `labelled_batches` does."""
        ahead, rows = tee(rows)
        places = (
            (self._shards[number], int(member), (visit, row))
            for visit, some in enumerate(ahead)
            for row, (number, member) in zip(some.tolist(), self._places[some.numpy()].tolist(), strict=True)
        )

        def read(shard: ShardIndex, member: int) -> bytes:
            return read_image(self._reader, shard, member)

        def prepared(data: bytes, where: tuple[int, int]) -> Real[np.ndarray, "c s s"]:
            if crop is None:
                return _centred(data, self.image_size, self.pixels)
            return crop(decode(data, pixels=self.pixels), self.image_size, *where)

        images, faults = decoded(places, read, prepared, self.threads), Faults()
        for some in rows:
            pairs = zip(some.tolist(), images, strict=False)  # takes no image beyond this batch
            found = [(row, image) for row, (shard, member, image) in pairs if faults.usable(shard, member, image)]
            size = (self.pixels.channels, self.image_size, self.image_size)
            stacked = torch.from_numpy(np.stack([image for _, image in found])) if found else torch.zeros(0, *size)
            yield stacked, torch.tensor([row for row, _ in found], dtype=torch.long)


def _centred(data: bytes, image_size: int, pixels: Pixels) -> Real[np.ndarray, "c s s"]:
    return views.centre_square(decode(data, pixels=pixels), image_size).transpose(2, 0, 1)


def part_of_samples(shards: Shards, part: tuple[int, int]) -> Iterator[tuple[ShardIndex, int]]:
    """The i-th of n stretches of all samples."""
    count = int(shards.counts.sum())
    return _places(shards, *(count * (part[0] + i) // part[1] for i in (0, 1)))


def _places(shards: Shards, first: int, last: int) -> Iterator[tuple[ShardIndex, int]]:
    """The samples from one position on to another. Opens no index of a shard that lies outside."""
    for number, count in enumerate(shards.counts.tolist()):
        if first < count and last > 0:
            shard = shards[number]
            yield from ((shard, member) for member in range(max(0, first), min(count, last)))
        first, last = first - count, last - count


class Faults:
    """Names images that cannot be used. Too many in a row are an error."""

    def __init__(self) -> None:
        self.in_a_row = 0

    def usable(self, shard: ShardIndex, member: int, found: Any) -> bool:
        """Whether what was found is no fault. Raises UserError after _MAX_FAULTS in a row, or all of a shard."""
        if not isinstance(found, SampleFault):
            self.in_a_row = 0
            return True
        fault = Fault(shard.url, shard.key(member), int(shard.offsets[member]), str(found))
        logger.warning("left out: %s", fault)
        self.in_a_row += 1
        if self.in_a_row == min(_MAX_FAULTS, len(shard)):
            raise UserError(f"{self.in_a_row} images in a row of shard {shard.url} cannot be used; {fault}.") from found
        return False


def decoded(
    places: Iterable[tuple[ShardIndex, int, T]],
    read: Callable[[ShardIndex, int], D],
    prepared: Callable[[D, T], Any],
    threads: int | None = None,
) -> Iterator[tuple[ShardIndex, int, Any]]:
    """Every place with what was prepared of it, or the fault that it has, in order: read here, prepared by threads (unset:
    one for each core that this process may use)."""

    def found() -> Iterator[tuple[ShardIndex, int, T, D | SampleFault]]:
        for shard, member, more in places:
            try:
                yield shard, member, more, read(shard, member)
            except SampleFault as error:
                yield shard, member, more, error

    def done(data: D | SampleFault, more: T) -> Any:
        if isinstance(data, SampleFault):
            return data
        try:
            return prepared(data, more)
        except SampleFault as error:
            return error

    threads = threads or cores()
    if threads == 1:
        for shard, member, more, data in found():
            yield shard, member, done(data, more)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[ShardIndex, int, Future[Any]]] = deque()
        try:
            for shard, member, more, data in found():
                waiting.append((shard, member, pool.submit(done, data, more)))
                if len(waiting) > 4 * threads:
                    ready = waiting.popleft()
                    yield ready[0], ready[1], ready[2].result()
            while waiting:
                ready = waiting.popleft()
                yield ready[0], ready[1], ready[2].result()
        finally:
            pool.shutdown(cancel_futures=True)
