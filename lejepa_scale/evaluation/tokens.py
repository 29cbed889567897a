"""Tokens of the patches of a training set, in half precision, in a file that is mapped into memory and has no name: a part
on every rank, gone with the process. Refuses sets whose tokens are larger than they may be."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from lejepa_scale.data.evaluation import Labelled
from lejepa_scale.data.masks import Segmented
from lejepa_scale.errors import UserError
from lejepa_scale.parallel.collectives import counts_of_ranks, gather_objects
from lejepa_scale.parallel.process_group import rank

LIMIT = 64.0  # GB of all ranks together
_HALF = 2  # bytes


@dataclass(frozen=True)
class Tokens:
    """Of the images of a set, in stored order, of which this rank has those in `own`."""

    values: Float[Tensor, "own l d"]  # float16 where they are stored
    own: range
    labels: Int[Tensor, " n"]  # of all ranks; -1 where unknown
    masks: UInt8[Tensor, "own s s"] | None = None  # class ids

    def __len__(self) -> int:
        return len(self.labels)


def normalized(tokens: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
    """Each token with mean 0 and variance 1, as LayerNorm without weights gives it."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:])


def stored(
    found: Iterable[tuple[Float[Tensor, "_b _l _d"], Labelled | Segmented]],
    own: int,
    total: int,
    *,
    folder: Path | None,
    limit: float = LIMIT,
) -> Tokens:
    """Keep what was found of a set, a part on each rank. own, total: images at most, of this rank and of all. folder: where
    the file is made; None: where temporary files are. limit: GB of all ranks' files together. Every rank calls. Raises
    UserError for more, for a disk without room, and for tokens that are no numbers."""
    values, masks = torch.zeros(0, 0, 0), torch.zeros(0, 0, 0, dtype=torch.uint8)
    labels = [torch.zeros(0, dtype=torch.long)]
    count = broken = 0
    for tokens, batch in found:
        if not count:
            side = batch.images.shape[-1] if isinstance(batch, Segmented) else 0
            _refuse(total, tokens.shape[1], tokens.shape[2], side, limit)
            values = _mapped(folder, (own, *tokens.shape[1:]), torch.float16)
            masks = _mapped(folder, (own, side, side), torch.uint8) if side else masks
        here = slice(count, count + len(tokens))
        values[here].copy_(tokens)
        broken += int((~values[here].flatten(1).isfinite().all(1)).sum())
        if isinstance(batch, Segmented):
            masks[here].copy_(batch.masks)
            labels.append(torch.full((len(tokens),), -1))
        else:
            labels.append(batch.labels)
        count += len(tokens)
    if lost := sum(gather_objects(broken)):
        raise UserError(
            f"the tokens of {lost} of {sum(gather_objects(count))} images are not finite (in half precision, to 65,504); "
            "nothing was scored."
        )
    counts = counts_of_ranks(count)
    shapes = gather_objects((values.shape[1:], masks.shape[1:]))
    of_values, of_masks = next((shapes[i] for i in range(len(counts)) if counts[i]), shapes[0])
    if not count:  # a rank without an image
        values, masks = torch.zeros(0, *of_values, dtype=torch.float16), torch.zeros(0, *of_masks, dtype=torch.uint8)
    first = sum(counts[: rank()])
    everyones = torch.cat(gather_objects(torch.cat(labels)))
    return Tokens(values[:count], range(first, first + count), everyones, masks[:count] if any(of_masks) else None)


def _refuse(images: int, tokens: int, width: int, side: int, limit: float) -> None:
    each = tokens * width * _HALF + side * side
    if images * each > limit * 1e9:
        masks = f" + {side} x {side} of its mask" if side else ""
        raise UserError(
            f"the tokens of {images:,} training images need {images * each / 1e9:,.3g} GB ({tokens:,} tokens x {width:,} x "
            f"{_HALF} bytes{masks} an image), more than --disk-limit {limit:g}. Name fewer training shards, give a smaller "
            "--image-size, or raise the limit where the disk of --cache has that room."
        )


def _mapped(folder: Path | None, shape: tuple[int, ...], dtype: torch.dtype) -> Shaped[Tensor, "..."]:
    """Of a file that the system forgets with the last reference."""
    size = torch.Size(shape).numel()
    if not size:
        return torch.zeros(shape, dtype=dtype)
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="tokens-") as file:
            os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)  # room for all of it, or an error now
            return torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(shape)
    except OSError as error:
        raise UserError(
            f"no room for {size * dtype.itemsize / 1e9:,.1f} GB of tokens in {folder or tempfile.gettempdir()}: "
            f"{error.strerror}. Name another --cache."
        ) from error
