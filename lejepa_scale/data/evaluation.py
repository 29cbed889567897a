"""Labelled images in stored order, as evaluation takes them."""

from __future__ import annotations

import logging
from collections.abc import Iterator

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
from lejepa_scale.data.index.shards import Shards, index_shards
from lejepa_scale.data.io.reader import Reader
from lejepa_scale.data.samples import read_image
from lejepa_scale.errors import UserError

logger = logging.getLogger(__name__)
_MAX_FAULTS: int = Data.model_fields["max_faults"].default


def evaluation_batches(
    shards: str | list[str] | Shards,
    *,
    image_size: int,
    batch_size: int,
    limit: int | None = None,
    pixels: Pixels = RGB,
    classes: ClassNumbers | None = None,
) -> Iterator[tuple[Real[Tensor, "_b _c _s _s"], Int[Tensor, " _b"]]]:
    """Images in stored order, resized and cut to the centre: ([B, C, S, S], int64 [B]); label -1 where unknown. Values are
    0..255: uint8, or float32 where `pixels` has a range. classes: numbers for the labels of several sets; unset, those
    of these shards.

    Images that cannot be used are named and left out. Raises UserError where a shard is missing or damaged, or holds none of
    use: after _MAX_FAULTS in a row."""
    if not isinstance(shards, Shards):
        shards = index_shards(shards_of(shards))
    classes = classes or class_numbers([shards])
    images: list[Real[np.ndarray, "c s s"]] = []
    labels: list[int] = []
    seen, in_a_row, reader = 0, 0, Reader()
    for shard in shards:
        for member in range(len(shard)):
            if limit is not None and seen >= limit:
                break
            try:
                image = decode(read_image(reader, shard, member), pixels=pixels)
            except SampleFault as error:
                fault = Fault(shard.url, shard.key(member), int(shard.offsets[member]), str(error))
                logger.warning("left out: %s", fault)
                in_a_row += 1
                if in_a_row == min(_MAX_FAULTS, len(shard)):
                    raise UserError(
                        f"{in_a_row} images in a row of shard {shard.url} cannot be used; {fault}."
                    ) from error
                continue
            in_a_row = 0
            images.append(views.centre_square(image, image_size).transpose(2, 0, 1))
            labels.append(classes.of(shard, member))
            seen += 1
            if len(images) == batch_size:
                yield torch.from_numpy(np.stack(images)), torch.tensor(labels)
                images, labels = [], []
    if images:
        yield torch.from_numpy(np.stack(images)), torch.tensor(labels)
