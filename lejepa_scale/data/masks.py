"""Images with a mask of class ids for each pixel, the two cut alike. Refuses masks of another size than their image, and
ids that no class has."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Real, Shaped, UInt8
from PIL import Image
from torch import Tensor

from lejepa_scale.data.evaluation import Faults, decoded, part_of_samples
from lejepa_scale.data.faults import SampleFault, printable
from lejepa_scale.data.images import views
from lejepa_scale.data.images.arrays import is_npy
from lejepa_scale.data.images.decode import MAX_PIXELS, decode
from lejepa_scale.data.images.pixels import RGB, DecodeError, Pixels, too_many
from lejepa_scale.data.index.keys import SampleKeys
from lejepa_scale.data.index.scan import NO_IMAGE, ShardIndex
from lejepa_scale.data.index.shards import Shards, index_shards
from lejepa_scale.data.io import npy
from lejepa_scale.data.io.reader import Reader
from lejepa_scale.data.samples import read_image
from lejepa_scale.errors import UserError

logger = logging.getLogger(__name__)
IGNORED = 255  # the id of pixels that are of no class
_MODES = ("1", "L", "P", "I", "I;16", "I;16B")  # of Pillow, with one number a pixel


class Segmented(NamedTuple):
    """A batch of images and their masks in stored order."""

    images: Real[Tensor, "_b _c _s _s"]  # 0..255, as in Labelled
    masks: UInt8[Tensor, "_b _s _s"]  # class ids, IGNORED for none
    keys: list[str]


def index_masks(shards: Shards, mask_key: str) -> Shards:
    """Where the masks lie in these shards: members of this ending. Raises UserError where a shard has none."""
    keys = replace(SampleKeys.parsed(mask_key, ""), label="cls")
    try:
        return index_shards(shards.urls, keys=keys)
    except UserError as error:
        raise UserError(
            f"segmentation takes shards with a mask beside each image, as KEY.jpg and KEY.{mask_key} (--mask-key names "
            f"another ending): {error}"
        ) from error


def segmented_batches(
    shards: Shards,
    masks: Shards,
    *,
    image_size: int,
    batch_size: int,
    pixels: Pixels = RGB,
    classes: int | None = None,
    part: tuple[int, int] = (0, 1),
    threads: int | None = None,
) -> Iterator[Segmented]:
    """Images and masks in stored order, resized (masks: the nearest pixel) and cut to the centre. masks: of `index_masks`.
    classes: how many there are; unset, up to 255. part, threads: as of `labelled_batches`.

    Images that cannot be used, and those without a mask, are named and left out. Raises UserError for a mask that is no
    picture of one whole number a pixel, that is of another size than its image, and that has an id which no class has."""
    reader, faults = Reader(), Faults()
    members: dict[str, dict[bytes, int]] = {}
    numbers = {str(url): number for number, url in enumerate(masks.urls)}

    def mask_of(shard: ShardIndex, member: int) -> tuple[ShardIndex, int]:
        there = masks[numbers[str(shard.url)]]
        if str(shard.url) not in members:
            members.clear()  # those of one shard at a time: samples come in stored order
            members[str(shard.url)] = {key: n for n, key in enumerate(there.keys.tolist())}
        found = members[str(shard.url)].get(shard.keys[member])
        if found is None or there.sizes[found] == NO_IMAGE:
            raise SampleFault("it has no mask")
        return there, found

    def read(shard: ShardIndex, member: int) -> tuple[bytes, bytes, str]:
        mask = read_image(reader, *mask_of(shard, member))
        return read_image(reader, shard, member), mask, f"{printable(shard.url)}, sample {printable(shard.key(member))}"

    def prepared(data: tuple[bytes, bytes, str], _: None) -> tuple[np.ndarray, np.ndarray]:
        image, mask, where = data
        whole = decode(image, pixels=pixels)
        try:
            ids = read_mask(mask, classes)
        except DecodeError as error:
            raise UserError(f"the mask of {where}: {error}.") from error
        if ids.shape != whole.shape[:2]:
            raise UserError(
                f"the mask of {where} has {ids.shape[1]} x {ids.shape[0]} pixels, and its image {whole.shape[1]} x "
                f"{whole.shape[0]}: write them with one size."
            )
        return views.centre_square(whole, image_size).transpose(2, 0, 1), centre_square(ids, image_size)

    places = ((shard, member, None) for shard, member in part_of_samples(shards, part))
    images, ids, keys = list[np.ndarray](), list[np.ndarray](), list[str]()
    for shard, member, found in decoded(places, read, prepared, threads):
        if not faults.usable(shard, member, found):
            continue
        images.append(found[0])
        ids.append(found[1])
        keys.append(shard.key(member))
        if len(images) == batch_size:
            yield _batch(images, ids, keys)
            images, ids, keys = [], [], []
    if images:
        yield _batch(images, ids, keys)


def _batch(images: list[np.ndarray], ids: list[np.ndarray], keys: list[str]) -> Segmented:
    return Segmented(torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(ids)), keys)


def read_mask(data: bytes, classes: int | None = None) -> UInt8[np.ndarray, "h w"]:
    """Class ids of a picture with one band (the indices of one with a palette) or of an array [H, W]; IGNORED is 255.
    Raises DecodeError for other pictures, and for an id that is not among `classes` (unset: 0..254)."""
    if is_npy(data):
        try:
            ids: Shaped[np.ndarray, "..."] = npy.read(data)
        except ValueError as error:
            raise DecodeError(str(error)) from error
    else:
        try:
            with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise too_many(picture.height, picture.width, MAX_PIXELS)
                if picture.mode not in _MODES:
                    raise DecodeError(
                        f"a picture of {len(picture.getbands())} bands ({picture.mode}), where class ids are one number a "
                        "pixel"
                    )
                ids = np.asarray(picture)
        except DecodeError:
            raise
        except Exception as error:  # Pillow's decoders raise many kinds for damaged files
            raise DecodeError(f"no picture that can be read ({error or type(error).__name__})") from error
    if ids.ndim != 2 or ids.dtype.kind not in "uib" or not ids.size:
        raise DecodeError(
            f"an array {' x '.join(map(str, ids.shape))} of {ids.dtype}, where class ids are whole numbers [H, W]"
        )
    most = IGNORED if classes is None else classes
    wrong = (ids != IGNORED) & ((ids < 0) | (ids >= most))
    if wrong.any():
        raise DecodeError(
            f"class id {int(ids[wrong][0])} in {int(wrong.sum()):,} of {ids.size:,} pixels; ids are 0..{most - 1}, and "
            f"{IGNORED} is no class"
        )
    return ids.astype(np.uint8)


def centre_square(ids: UInt8[np.ndarray, "h w"], size: int) -> UInt8[np.ndarray, "{size} {size}"]:
    """The part of a mask that `views.centre_square` keeps of its image, of the nearest pixels."""
    h, w = ids.shape
    if max(h, w) > views._LONG * min(h, w):
        kept = views._LONG * min(h, w)
        top, left = max(0, h - kept) // 2, max(0, w - kept) // 2
        ids = ids[top : top + kept, left : left + kept]
        h, w = ids.shape
    ratio = size / min(h, w)
    h, w = max(size, round(h * ratio)), max(size, round(w * ratio))
    top, left = (h - size) // 2, (w - size) // 2
    planes = torch.from_numpy(np.ascontiguousarray(ids))[None, None]
    return F.interpolate(planes, (h, w), mode="nearest-exact")[0, 0, top : top + size, left : left + size].numpy()
