"""Labelled images in stored order, as evaluation takes them."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Real
from torch import Tensor

from lejepa_scale.config import Data
from lejepa_scale.data.faults import Fault, SampleFault
from lejepa_scale.data.folders import shards_of
from lejepa_scale.data.images import views
from lejepa_scale.data.images.decode import decode
from lejepa_scale.data.images.pixels import RGB, Pixels
from lejepa_scale.data.index.classes import ClassNumbers, class_numbers
from lejepa_scale.data.index.scan import ShardIndex
from lejepa_scale.data.index.shards import Shards, index_shards
from lejepa_scale.data.io.reader import Reader
from lejepa_scale.data.samples import read_image
from lejepa_scale.errors import UserError

logger = logging.getLogger(__name__)
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
    images: list[Real[np.ndarray, "c s s"]] = []
    labels: list[int] = []
    keys: list[str] = []
    in_a_row, reader = 0, Reader()
    count = int(shards.counts.sum())
    places = _places(shards, *(count * (part[0] + i) // part[1] for i in (0, 1)))

    def prepared(data: bytes) -> Real[np.ndarray, "c s s"]:
        return views.centre_square(decode(data, pixels=pixels), image_size).transpose(2, 0, 1)

    for shard, member, image in _decoded(places, reader, prepared, threads or len(os.sched_getaffinity(0))):
        if isinstance(image, SampleFault):
            fault = Fault(shard.url, shard.key(member), int(shard.offsets[member]), str(image))
            logger.warning("left out: %s", fault)
            in_a_row += 1
            if in_a_row == min(_MAX_FAULTS, len(shard)):
                raise UserError(f"{in_a_row} images in a row of shard {shard.url} cannot be used; {fault}.") from image
            continue
        in_a_row = 0
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


def _places(shards: Shards, first: int, last: int) -> Iterator[tuple[ShardIndex, int]]:
    """The samples from one position on to another. Opens no index of a shard that lies outside."""
    for number, count in enumerate(shards.counts.tolist()):
        if first < count and last > 0:
            shard = shards[number]
            yield from ((shard, member) for member in range(max(0, first), min(count, last)))
        first, last = first - count, last - count


def _decoded(
    places: Iterator[tuple[ShardIndex, int]], reader: Reader, prepared: Callable[[bytes], Any], threads: int
) -> Iterator[tuple[ShardIndex, int, Any]]:
    """Every sample's image, or the fault that it has, in order: read here, decoded by threads."""

    def read() -> Iterator[tuple[ShardIndex, int, Any]]:
        for shard, member in places:
            try:
                yield shard, member, read_image(reader, shard, member)
            except SampleFault as error:
                yield shard, member, error

    def decoded(data: bytes | SampleFault) -> Any:
        if isinstance(data, SampleFault):
            return data
        try:
            return prepared(data)
        except SampleFault as error:
            return error

    if threads == 1:
        for shard, member, data in read():
            yield shard, member, decoded(data)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[ShardIndex, int, Future[Any]]] = deque()
        try:
            for shard, member, data in read():
                waiting.append((shard, member, pool.submit(decoded, data)))
                if len(waiting) > 4 * threads:
                    ready = waiting.popleft()
                    yield ready[0], ready[1], ready[2].result()
            while waiting:
                ready = waiting.popleft()
                yield ready[0], ready[1], ready[2].result()
        finally:
            pool.shutdown(cancel_futures=True)
