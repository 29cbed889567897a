"""Held-out images for an evaluation while training: chosen once, evenly spread over their sets, decoded once and held as
bytes, a part on every rank. An evaluation reads no file."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from lejepa_scale.config import BatchPlan, Config
from lejepa_scale.data import Batch, Loader, Mixture, Pixels, open_mixture
from lejepa_scale.data.evaluation import Labelled, labelled_batches
from lejepa_scale.data.images.photometric import normalize
from lejepa_scale.data.images.pixels import of_run
from lejepa_scale.data.index.classes import ClassNumbers, class_numbers
from lejepa_scale.data.index.shards import Shards
from lejepa_scale.errors import UserError
from lejepa_scale.parallel import collectives, process_group
from lejepa_scale.parallel.threads import cores

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """The sets, indexed, and what their images are."""

    train: Mixture
    test: Mixture
    classes: ClassNumbers
    pixels: Pixels

    @property
    def labelled(self) -> bool:
        """Whether every image of both has a label, of two classes or more."""
        return self.classes.count > 1 and all(m.num_labelled == m.num_samples for m in (self.train, self.test))


def open_held_out(config: Config) -> HeldOut | None:
    """The sets that the evaluation section names, indexed by rank 0; None without one. Every rank calls. Raises UserError,
    on every rank, for a set that is not there or not like the run's own."""
    settings = config.evaluation
    if settings.every is None:
        return None
    assert settings.test is not None  # config/checks.py
    sources = config.data.shards
    kinds = {(source.image_key, source.label_key, str(source.range)) for source in sources}
    if len(kinds) > 1:
        raise UserError(
            "evaluation.every: the sources of data.shards differ in image_key, label_key or range, so that nothing says "
            "how evaluation.test is read. Leave evaluation.every out, and evaluate checkpoints with `lejepa evaluate`."
        )
    of_train = settings.train or [pattern for source in sources for pattern in source.shards]
    data = {
        name: config.data.model_copy(
            update={"shards": [sources[0].model_copy(update={"shards": patterns, "weight": 1.0})]}
        )
        for name, patterns in (("train", of_train), ("test", settings.test))
    }

    def read(build: bool) -> HeldOut:
        sets = {name: open_mixture(section, build=build) for name, section in data.items()}
        both = class_numbers([shards for mixture in sets.values() for shards in mixture.shards], build=build)
        return HeldOut(sets["train"], sets["test"], both, of_run(config.data))

    collectives.on_rank_zero(lambda: len(read(True).test.shards), "indexing the shards of evaluation")
    found = collectives.everywhere(lambda: read(False), "reading the index of evaluation")
    if process_group.rank() == 0 and not found.labelled:
        logger.info(
            "no k-NN and linear probe while training: not every image of evaluation.test and .train has a label."
        )
    return found


@dataclass(frozen=True)
class Images:
    """This rank's part of a set, as many as every rank's."""

    images: Real[Tensor, "n c s s"]
    labels: Int[Tensor, " n"]
    pixels: Pixels

    def batches(self, size: int, device: torch.device) -> Iterator[Float[Tensor, "1 _b c s s"]]:
        """As a single view each, normalized, on `device`."""
        for part in self.images.split(size):
            yield normalize(part.to(device), self.pixels)[None]


def spread_images(held: HeldOut, mixture: Mixture, count: int, side: int) -> Images:
    """`count` images of a set, or all, evenly spread, cut to the centre: this rank's part of them. Every rank calls. Raises
    UserError, on every rank, where too few can be read."""
    shards, total = mixture.shards[0], mixture.num_samples
    rank, world = process_group.rank(), process_group.world_size()
    count = min(count, total) // world * world
    if count == 0:
        raise UserError(f"evaluation: {total} images in {shards.urls[0]} are fewer than the {world} ranks.")

    def read() -> list[Labelled]:
        with ThreadPoolExecutor(cores()) as pool:
            found = list(pool.map(lambda i: _first_of(held, shards, i, count, side), range(rank, count, world)))
        return [one for one in found if one is not None]

    kept = collectives.everywhere(read, "reading the images of evaluation")
    same = min(collectives.counts_of_ranks(len(kept)))  # a stretch may have none that can be used
    if same == 0:
        raise UserError(f"evaluation: no image of {shards.urls[0]} can be used.")
    return Images(
        torch.cat([one.images for one in kept[:same]]), torch.cat([one.labels for one in kept[:same]]), held.pixels
    )


def _first_of(held: HeldOut, shards: Shards, part: int, parts: int, side: int) -> Labelled | None:
    """The first image of a stretch that can be used."""
    batches = labelled_batches(
        shards,
        image_size=side,
        batch_size=1,
        limit=1,
        pixels=held.pixels,
        classes=held.classes,
        part=(part, parts),
        threads=1,
    )
    return next(iter(batches), None)


def views_of(config: Config, plan: BatchPlan, held: HeldOut) -> list[list[Batch]]:
    """Micro-batches of held-out images with the views that training would make of them, step by step, on this rank: always
    the same ones. Every rank calls. Raises UserError, on every rank, where they cannot be read."""
    steps = min(config.evaluation.view_images, held.test.num_samples) // plan.global_batch
    if config.evaluation.view_images and not steps:
        logger.info(
            "no held-out loss and LiDAR: evaluation.view_images and evaluation.test have fewer images than a batch, %d.",
            plan.global_batch,
        )

    def read() -> list[list[Batch]]:
        data = config.data.model_copy(update={"workers": 0})
        loader = Loader(held.test, data, plan, seed=config.run.seed, rank=process_group.rank())
        with loader, closing(iter(loader)) as batches:  # type: ignore[type-var]
            return [list(islice(batches, plan.accumulation)) for _ in range(steps)]

    return collectives.everywhere(read, "reading the images of evaluation")
