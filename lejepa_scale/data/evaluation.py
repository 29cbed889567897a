"""Labelled images in stored order, as evaluation takes them."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from lejepa_scale.data.faults import Fault, SampleFault
from lejepa_scale.data.images import views
from lejepa_scale.data.images.decode import decode
from lejepa_scale.data.index.shards import index_shards
from lejepa_scale.data.io.reader import Reader, expand
from lejepa_scale.data.samples import read_image

logger = logging.getLogger(__name__)


def evaluation_batches(
    shards: str | list[str], *, image_size: int, batch_size: int, limit: int | None = None
) -> Iterator[tuple[UInt8[Tensor, "_b 3 _s _s"], Int[Tensor, " _b"]]]:
    """Images in stored order, resized and cut to the centre: (uint8 [B, 3, S, S], int64 [B]); label -1 where unknown.
    Images that cannot be used are named and left out. Raises UserError where a shard is missing or damaged."""
    patterns = [shards] if isinstance(shards, str) else shards
    images: list[UInt8[np.ndarray, "3 s s"]] = []
    labels: list[int] = []
    seen, reader = 0, Reader()
    for shard in index_shards(expand(patterns), reader=reader):
        for member in range(len(shard)):
            if limit is not None and seen >= limit:
                break
            try:
                image = decode(read_image(reader, shard, member))
            except SampleFault as error:
                fault = Fault(shard.url, shard.key(member), int(shard.offsets[member]), str(error))
                logger.warning("left out: %s", fault)
                continue
            images.append(views.centre_square(image, image_size).transpose(2, 0, 1))
            labels.append(int(shard.labels[member]))
            seen += 1
            if len(images) == batch_size:
                yield torch.from_numpy(np.stack(images)), torch.tensor(labels)
                images, labels = [], []
    if images:
        yield torch.from_numpy(np.stack(images)), torch.tensor(labels)
