"""Batches of views for a rank, for ever: composes order, bytes, decoding, crops and colours. Its whole state is the
number of the next step, advanced by the trainer."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from lejepa_scale.config import BatchPlan, Config, Data
from lejepa_scale.data import photometric, views
from lejepa_scale.data.decode import DecodeError, decode
from lejepa_scale.data.index import ShardIndex, index_shards
from lejepa_scale.data.keylog import Header, Record
from lejepa_scale.data.order import Location, Order, positions
from lejepa_scale.data.stream import expand, localise, read
from lejepa_scale.errors import UserError

_ATTEMPTS = 16  # neighbours tried in place of an image that does not decode


@dataclass(frozen=True)
class Batch:
    """One rank's micro-batch. Views as cut: uint8 [V, B, 3, S, S] per resolution, with their colour parameters."""

    views: list[Tensor]
    parameters: list[Tensor]  # [V, B, P] per resolution; stay on the CPU
    labels: Tensor  # int64 [B], -1 where unknown
    keys: list[str]
    skipped: list[str]  # "shard:key: reason" of images that did not decode and were replaced
    records: list[Record]  # what was drawn, for the key log
    ready: list[Tensor] | None = None  # augmented views, where they were made ahead

    def pin_memory(self) -> Batch:
        return replace(self, views=[v.pin_memory() for v in self.views], labels=self.labels.pin_memory())

    def augmented(self, device: torch.device) -> list[Tensor]:
        """Float views [V, B, 3, S, S] on `device`, augmented and normalised there."""
        if self.ready is not None:
            return self.ready
        out = []
        for cut, parameters in zip(self.views, self.parameters, strict=True):
            moved = cut.to(device, non_blocking=True).flatten(0, 1)
            out.append(photometric.apply(moved, parameters.flatten(0, 1)).unflatten(0, cut.shape[:2]))
        return out


@dataclass(frozen=True)
class Sources:
    """The indexed shards of every source of a mixture."""

    shards: list[list[ShardIndex]]
    weights: list[float]

    @property
    def num_samples(self) -> int:
        return sum(len(shard) for source in self.shards for shard in source)

    @property
    def num_classes(self) -> int:
        """1 + the largest label where every sample has one, else 0."""
        labels = [shard.labels for source in self.shards for shard in source]
        return 1 + max(int(x.max()) for x in labels) if all((x >= 0).all() for x in labels) else 0

    @property
    def fingerprint(self) -> str:
        """Changes when shards, their names, sizes or the weights change: the order would not be the same."""
        text = repr([[(s.path.name, len(s), s.nbytes) for s in source] for source in self.shards]) + repr(self.weights)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def record(self, position: int, location: Location, key: str) -> Record:
        """What was drawn at a position, where the sample called `key` came of it."""
        shard = self.shards[location.source][location.shard]
        drawn = str(shard.keys[location.member])
        return Record(position, *location, f"{shard.path.name}/{drawn}", "" if key == drawn else key)

    def key_log_header(self, config: Config, *, decoded: bool) -> Header:
        """All that the order depends on, how many samples an epoch of each source has, and whether images were read."""
        return {
            "fingerprint": self.fingerprint,
            "seed": config.run.seed,
            "shuffle_block": config.data.shuffle_block,
            "global_batch": config.train.global_batch,
            "samples": [sum(map(len, source)) for source in self.shards],
            "decoded": decoded,
        }


def open_sources(data: Data) -> Sources:
    """Expand, fetch and index every shard of the configuration. Raises UserError that names what is missing."""
    shards = []
    for source in data.shards:
        paths = [localise(url, data.cache_dir) for url in expand(source.shards)]
        shards.append(index_shards(paths))
    return Sources(shards, [source.weight for source in data.shards])


class _Samples(Dataset[Batch]):
    def __init__(self, sources: Sources, config: Config) -> None:
        self.sources, self.seed = sources, config.run.seed
        counts = [[len(shard) for shard in source] for source in sources.shards]
        self.order = Order(counts, sources.weights, config.run.seed, config.data.shuffle_block)
        self.groups = [group for group in (config.data.views.global_, config.data.views.local) if group.count]
        self.enough = views.enough(self.groups)
        self.augment = config.data.augment

    def __getitems__(self, where: list[int]) -> Batch:
        skipped: list[str] = []
        cut = [torch.empty(g.count, len(where), 3, g.size, g.size, dtype=torch.uint8) for g in self.groups]
        parameters = [torch.empty(g.count, len(where), photometric.WIDTH) for g in self.groups]
        if get_worker_info() is not None:  # a worker's tensors go there anyway; on the heap they would fragment it
            cut = [tensor.share_memory_() for tensor in cut]
        labels, keys, records = [], [], []
        for b, (position, location) in enumerate(zip(where, self.order.locate(where), strict=True)):
            image, shard, member = self._image(location, skipped)
            for i, (group, (crops, colours)) in enumerate(zip(self.groups, self._draws(location), strict=True)):
                cut[i][:, b] = views.cut_views(image, group, crops)
                parameters[i][:, b] = torch.from_numpy(photometric.draw(colours, self.augment))
            labels.append(int(shard.labels[member]))
            keys.append(str(shard.keys[member]))
            records.append(self.sources.record(position, location, keys[-1]))
        return Batch(cut, parameters, torch.tensor(labels), keys, skipped, records)

    def _draws(self, location: Location) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Uniform numbers of each group, for crops and for colours, a row per view: a function of (seed, epoch, sample,
        group, view), so that a further view, or a group without any, changes no other."""
        key = np.random.SeedSequence((self.seed, 2, *location)).generate_state(2, np.uint64)
        for number, group in enumerate(self.groups):
            generator = np.random.Generator(np.random.Philox(key=key, counter=(0, 0, 0, number)))
            draws = generator.random((group.count, views.DRAWS + photometric.DRAWS))
            yield draws[:, : views.DRAWS], draws[:, views.DRAWS :]

    def _image(self, location: Location, skipped: list[str]) -> tuple[np.ndarray, ShardIndex, int]:
        """The image at `location`; where it does not decode, the next of its shard that does (so the replacement does
        not depend on ranks or workers)."""
        shard = self.sources.shards[location.source][location.shard]
        for attempt in range(min(_ATTEMPTS, len(shard))):
            member = (location.member + attempt) % len(shard)
            try:
                data = read(shard.path, int(shard.offsets[member]), int(shard.sizes[member]))
                return decode(data, self.enough), shard, member
            except DecodeError as error:
                skipped.append(f"{shard.path}:{shard.keys[member]}: {error}")
        raise UserError(
            f"{min(_ATTEMPTS, len(shard))} images in a row of shard {shard.path} do not decode, from "
            f"{shard.keys[location.member]} on. The shard is damaged: write it again or remove it from data.shards."
        )


class _Names(_Samples):
    """The same samples, unread: batches without views."""

    def __getitems__(self, where: list[int]) -> Batch:
        found = self.order.locate(where)
        keys = [str(self.sources.shards[x.source][x.shard].keys[x.member]) for x in found]
        records = [self.sources.record(*drawn) for drawn in zip(where, found, keys, strict=True)]
        return Batch([], [], torch.empty(0, dtype=torch.long), keys, [], records)


class Loader:
    """Iterates (step, micro-batches of this rank) from `first_step` for ever; a pure function of the configuration."""

    def __init__(
        self,
        sources: Sources,
        config: Config,
        plan: BatchPlan,
        *,
        rank: int,
        first_step: int,
        pin_memory: bool,
        decode: bool = True,  # without, batches name their samples and hold no views
    ) -> None:
        self.plan, self.rank, self.first_step = plan, rank, first_step
        workers = config.data.workers
        cv2.setNumThreads(1)  # workers and ranks are the parallelism
        self._loader: DataLoader[Batch] = DataLoader(
            (_Samples if decode else _Names)(sources, config),
            batch_sampler=_Positions(plan, rank, first_step),  # type: ignore[arg-type]
            collate_fn=_same,  # type: ignore[arg-type]
            num_workers=workers,
            prefetch_factor=config.data.prefetch if workers else None,
            persistent_workers=False,
            worker_init_fn=_start_worker,
            pin_memory=pin_memory,
        )

    def __iter__(self) -> Iterator[Batch]:
        """This rank's micro-batches, `accumulation` of them per step."""
        try:
            yield from self._loader
        except UserError as error:  # a worker's error arrives with its traceback; the last line is the message
            raise UserError(str(error).strip().rpartition("UserError: ")[2]) from None


class _Positions:
    def __init__(self, plan: BatchPlan, rank: int, first_step: int) -> None:
        self.plan, self.rank, self.first_step = plan, rank, first_step

    def __iter__(self) -> Iterator[list[int]]:
        step = self.first_step
        while True:
            for micro in range(self.plan.accumulation):
                yield list(positions(step, micro, self.rank, self.plan))
            step += 1


def _same(batch: Batch) -> Batch:
    return batch


def _start_worker(_: int) -> None:
    # The trainer decides when to stop: a signal to the process group must not take the workers away before it has saved.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)


def evaluation_batches(
    shards: str | list[str], *, image_size: int, batch_size: int, limit: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images in stored order, resized and cut to the centre: (uint8 [B, 3, S, S], int64 [B]); label -1 where unknown.
    Images that do not decode are left out."""
    patterns = [shards] if isinstance(shards, str) else shards
    images: list[np.ndarray] = []
    labels: list[int] = []
    seen = 0
    for path in [localise(url, None) for url in expand(patterns)]:
        (shard,) = index_shards([Path(path)])
        for member in range(len(shard)):
            if limit is not None and seen >= limit:
                break
            try:
                image = decode(read(shard.path, int(shard.offsets[member]), int(shard.sizes[member])))
            except DecodeError:
                continue
            images.append(views.centre_square(image, image_size).transpose(2, 0, 1))
            labels.append(int(shard.labels[member]))
            seen += 1
            if len(images) == batch_size:
                yield torch.from_numpy(np.stack(images)), torch.tensor(labels)
                images, labels = [], []
    if images:
        yield torch.from_numpy(np.stack(images)), torch.tensor(labels)
