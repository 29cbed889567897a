"""Encoding the images of sets, by all ranks: features, tokens, and the images themselves. Refuses to score."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lejepa_scale.data.evaluation import Labelled, Samples, labelled_batches
from lejepa_scale.data.folders import shards_of
from lejepa_scale.data.index.classes import ClassNumbers, class_numbers
from lejepa_scale.data.index.keys import SampleKeys
from lejepa_scale.data.index.shards import Shards, index_shards
from lejepa_scale.data.masks import Segmented, index_masks, segmented_batches
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.cache import Cache
from lejepa_scale.evaluation.features import B, Extracted, Kind, encoded, extract, patch_tokens, raw_pixels
from lejepa_scale.evaluation.metrics import part_of
from lejepa_scale.evaluation.subjects import Subject
from lejepa_scale.evaluation.tokens import normalized
from lejepa_scale.parallel.collectives import counts_of_ranks, gather_objects, gather_rows
from lejepa_scale.parallel.process_group import rank, world_size


def indexed(sets: dict[str, str | Sequence[str]], keys: SampleKeys) -> tuple[dict[str, Shards], ClassNumbers]:
    """The shards of each set, and the numbers of their classes. What has to be made first, one rank makes for all."""
    for turn in (True, False):
        if (rank() == 0) is turn:
            shards = {name: index_shards(shards_of(patterns), keys=keys) for name, patterns in sets.items()}
            numbers = class_numbers(list(shards.values()))
        gather_objects(turn)
    return shards, numbers


@dataclass
class Work:
    """Encoding, by all ranks."""

    sets: dict[str, Shards]
    numbers: ClassNumbers
    batch: int
    device: torch.device
    kinds: list[Kind]
    cache: Cache
    _masks: dict[str, dict[str, Shards]] = field(default_factory=dict)

    def features(self, subject: Subject) -> dict[str, Extracted]:
        """Of both sets. The encoder is built where some are not in the cache."""
        model: torch.nn.Module | None = None
        out = {}
        for name, shards in self.sets.items():
            key = self.cache.key(subject, shards, self.numbers)
            known = self.cache.read(key, self.kinds)
            if not all(gather_objects(known is not None)):
                model = self.model(subject) if model is None else model
                part = extract(
                    model,
                    self._batches(shards, subject),
                    self.device,
                    self.kinds,
                    name=f"{subject.name}, {name}",
                    pixels=subject.pixels,
                    before_classifier=subject.before_classifier,
                    total=int(shards.counts.sum()) // world_size(),
                )
                known = _whole(part)
                if rank() == 0:
                    self.cache.write(key, known)
            assert known is not None
            out[name] = known
        return out

    def raw_pixels(self, like: Subject) -> dict[str, Extracted]:
        """Of images as `like` is given them."""
        return {
            name: _whole(raw_pixels(self._batches(shards, like), pixels=like.pixels))
            for name, shards in self.sets.items()
        }

    def labelled(self, name: str, subject: Subject) -> Iterator[Labelled]:
        """This rank's part of a set, as the subject is given it."""
        return self._batches(self.sets[name], subject)

    def samples(self, name: str, subject: Subject) -> Samples:
        """A set, by number."""
        return Samples(self.sets[name], self.numbers, image_size=subject.image_size, pixels=subject.pixels)

    def tokens(
        self, name: str, subject: Subject, model: nn.Module, *, normalize: bool
    ) -> Generator[tuple[Float[Tensor, "_b _l _d"], Labelled], None, None]:
        """The tokens of the patches of this rank's part of a set."""
        return self._tokens(model, self.labelled(name, subject), name, subject, normalize)

    def segmented(
        self, name: str, subject: Subject, model: nn.Module, mask_key: str, classes: int | None
    ) -> Generator[tuple[Float[Tensor, "_b _l _d"], Segmented], None, None]:
        """The same, with masks. Raises UserError where a shard has none."""
        batches = segmented_batches(
            self.sets[name],
            self.masks(mask_key)[name],
            image_size=subject.image_size,
            batch_size=self.batch,
            pixels=subject.pixels,
            classes=classes,
            part=(rank(), world_size()),
        )
        return self._tokens(model, batches, name, subject, False)

    def masks(self, mask_key: str) -> dict[str, Shards]:
        """Where the masks of each set lie, indexed by one rank for all. Raises UserError where a shard has none."""
        if mask_key not in self._masks:
            for turn in (True, False):
                if (rank() == 0) is turn:
                    self._masks[mask_key] = {name: index_masks(shards, mask_key) for name, shards in self.sets.items()}
                gather_objects(turn)
        return self._masks[mask_key]

    def images(self, name: str) -> tuple[int, int]:
        """At most, of this rank's part of a set and of all."""
        total = int(self.sets[name].counts.sum())
        return len(part_of(total, (rank(), world_size()))), total

    def model(self, subject: Subject) -> nn.Module:
        """Built, on the device, in eval mode."""
        return subject.build().to(self.device).eval()

    def _tokens(self, model: nn.Module, batches: Iterator[B], name: str, subject: Subject, normalize: bool) -> Any:
        def encode(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b _l _d"]:
            tokens = patch_tokens(model, images)
            return normalized(tokens) if normalize else tokens

        return encoded(
            encode,
            batches,
            self.device,
            asked="patch",
            name=f"{subject.name}, tokens of {name}",
            pixels=subject.pixels,
            total=self.images(name)[0],
        )

    def _batches(self, shards: Shards, subject: Subject) -> Iterator[Labelled]:
        return labelled_batches(
            shards,
            image_size=subject.image_size,
            batch_size=self.batch,
            pixels=subject.pixels,
            classes=self.numbers,
            part=(rank(), world_size()),
        )


def _whole(part: Extracted) -> Extracted:
    """Of all ranks' images, in stored order, on every rank."""
    if world_size() == 1:
        return part
    counts = counts_of_ranks(len(part.labels))
    rows = {}
    for kind, own in part.rows.items():
        width = max(gather_objects(own.shape[1]))
        own = own if len(own) else own.new_zeros(0, width)
        rows[kind] = gather_rows(own[None], counts, same_use=True)[0]
    labels = torch.cat(gather_objects(part.labels))
    return Extracted(rows, labels, [key for keys in gather_objects(part.keys) for key in keys])


def device_of(named: torch.device | str | None) -> torch.device:
    """The one that is named, else the GPU where there is one. Raises UserError where it is not here."""
    if named is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(named)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without CUDA
        raise UserError(f"device {named} is not here: {str(error).splitlines()[0]}") from error
    return device
