"""Batches of views for a rank, for ever: composes order, bytes, decoding, crops and colours. Its whole state is the
number of the next step, advanced by the trainer."""

from __future__ import annotations

import hashlib
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from lejepa_scale.config import BatchPlan, Config, Data
from lejepa_scale.data import photometric, views
from lejepa_scale.data.decode import decode
from lejepa_scale.data.faults import Fault, SampleFault
from lejepa_scale.data.index import Shards, index_shards
from lejepa_scale.data.keylog import Header, Record
from lejepa_scale.data.order import Location, Order, positions
from lejepa_scale.data.samples import read_ahead, read_image
from lejepa_scale.data.scan import ShardIndex
from lejepa_scale.data.stream import Reader, expand
from lejepa_scale.errors import UserError


@dataclass(frozen=True)
class Batch:
    """One rank's micro-batch. Views as cut: uint8 [V, B, 3, S, S] per resolution, with their colour parameters."""

    views: list[Tensor]
    parameters: list[Tensor]  # [V, B, P] per resolution; stay on the CPU
    labels: Tensor  # int64 [B], -1 where unknown
    keys: list[str]
    skipped: list[Fault]  # samples that could not be used and were replaced; `keys` has what took their place
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

    shards: list[Shards]
    weights: list[float]

    @property
    def counts(self) -> list[np.ndarray]:
        """Samples of each shard, for each source: int64 [shards]."""
        return [source.counts for source in self.shards]

    @property
    def num_samples(self) -> int:
        return sum(int(counts.sum()) for counts in self.counts)

    @property
    def num_labelled(self) -> int:
        return sum(int(source.rows["labelled"].sum()) for source in self.shards)

    @property
    def num_classes(self) -> int:
        """1 + the largest label where every sample has one, else 0."""
        return max(int(s.rows["classes"].max()) for s in self.shards) if self.num_labelled == self.num_samples else 0

    @property
    def fingerprint(self) -> str:
        """Changes when shards, their names, contents or the weights change: the order would not be the same."""
        parts = b"".join(source.fingerprint for source in self.shards) + repr(self.weights).encode()
        return hashlib.blake2b(parts, digest_size=16).hexdigest()

    def record(self, position: int, location: Location, key: str) -> Record:
        """What was drawn at a position, where the sample called `key` came of it."""
        shard = self.shards[location.source][location.shard]
        drawn = shard.key(location.member)
        return Record(position, *location, f"{shard.name}/{drawn}", "" if key == drawn else key)

    def key_log_header(self, config: Config, *, decoded: bool) -> Header:
        """All that the order depends on, how many samples an epoch of each source has, and whether images were read."""
        return {
            "fingerprint": self.fingerprint,
            "seed": config.run.seed,
            "shuffle_block": config.data.shuffle_block,
            "global_batch": config.train.global_batch,
            "samples": [int(counts.sum()) for counts in self.counts],
            "decoded": decoded,
        }


def open_sources(data: Data, *, build: bool = True) -> Sources:
    """Expand and index every source of the configuration. Raises UserError that names what is missing.

    Without `build`, only what another process has indexed is read."""
    reader = _reader(data)
    shards = [
        index_shards(expand(source.shards), reader=reader, index_dir=data.index_dir, build=build)
        for source in data.shards
    ]
    sources = Sources(shards, [source.weight for source in data.shards])
    if build and 0 < sources.num_labelled < sources.num_samples:
        missing = sources.num_samples - sources.num_labelled
        print(f"{missing} of {sources.num_samples} samples have no label: the online probe is off.", file=sys.stderr)
    return sources


def _reader(data: Data) -> Reader:
    return Reader(
        read_timeout=data.read_timeout, retries=data.retries, cache_dir=data.cache_dir, cache_gb=data.cache_gb
    )


class _Samples(Dataset[Batch]):
    def __init__(self, sources: Sources, config: Config) -> None:
        data = config.data
        self.sources, self.seed = sources, config.run.seed
        self.reader, self.max_faults, self.max_pixels = _reader(data), data.max_faults, data.max_pixels
        self.order = Order(sources.counts, sources.weights, config.run.seed, data.shuffle_block)
        self.groups = [group for group in (data.views.global_, data.views.local) if group.count]
        self.enough = views.enough(self.groups)
        self.augment = data.augment

    def __getitems__(self, where: list[int]) -> Batch:
        skipped: list[Fault] = []
        cut = [torch.empty(g.count, len(where), 3, g.size, g.size, dtype=torch.uint8) for g in self.groups]
        colours = [np.empty((g.count, len(where), photometric.DRAWS)) for g in self.groups]
        if get_worker_info() is not None:  # a worker's tensors go there anyway; on the heap they would fragment it
            cut = [tensor.share_memory_() for tensor in cut]
        labels, keys, records = [], [], []
        locations = self.order.locate(where)
        ahead = [read_ahead(self.reader, self._shard(location), location.member) for location in locations]
        for b, (position, location) in enumerate(zip(where, locations, strict=True)):
            image, shard, member = self._image(location, ahead[b], skipped)
            for i, (group, draws) in enumerate(zip(self.groups, self._draws(location), strict=True)):
                cut[i][:, b] = views.cut_views(image, group, draws[:, : views.DRAWS])
                colours[i][:, b] = draws[:, views.DRAWS :]
            labels.append(int(shard.labels[member]))
            keys.append(shard.key(member))
            records.append(self.sources.record(position, location, keys[-1]))
        drawn = [photometric.draw(x.reshape(-1, photometric.DRAWS), self.augment) for x in colours]
        parameters = [torch.from_numpy(d).view(*x.shape[:2], -1) for d, x in zip(drawn, colours, strict=True)]
        return Batch(cut, parameters, torch.tensor(labels), keys, skipped, records)

    def _draws(self, location: Location) -> Iterator[np.ndarray]:
        """Uniform numbers of each group, for crops and then for colours, a row per view: a function of (seed, epoch,
        sample, group, view), so that a further view, or a group without any, changes no other."""
        key = np.random.SeedSequence((self.seed, 2, *location)).generate_state(2, np.uint64)
        for number, group in enumerate(self.groups):
            generator = np.random.Generator(np.random.Philox(key=key, counter=(0, 0, 0, number)))
            yield generator.random((group.count, views.DRAWS + photometric.DRAWS))

    def _shard(self, location: Location) -> ShardIndex:
        return self.sources.shards[location.source][location.shard]

    def _image(
        self, location: Location, ahead: Future[bytes] | None, faults: list[Fault]
    ) -> tuple[np.ndarray, ShardIndex, int]:
        """The image at `location`; where it cannot be used, the next of its shard that can (so the replacement does
        not depend on ranks or workers)."""
        shard = self._shard(location)
        attempts = min(self.max_faults, len(shard))
        for attempt in range(attempts):
            member = (location.member + attempt) % len(shard)
            try:
                data = read_image(self.reader, shard, member, ahead)
                return decode(data, self.enough, self.max_pixels), shard, member
            except SampleFault as error:
                faults.append(Fault(shard.url, shard.key(member), int(shard.offsets[member]), str(error)))
                ahead = None
        first, last = faults[-attempts], faults[-1]
        raise UserError(
            f"{attempts} images in a row of shard {shard.url} cannot be used (data.max_faults = {self.max_faults}), from "
            f"{first.key} ({first.reason}) to {last.key} ({last.reason}). The shard is damaged: write it again or remove "
            "it from data.shards."
        )


class _Names(_Samples):
    """The same samples, unread: batches without views."""

    def __getitems__(self, where: list[int]) -> Batch:
        found = self.order.locate(where)
        keys = [self._shard(x).key(x.member) for x in found]
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
    Images that cannot be used are named and left out."""
    patterns = [shards] if isinstance(shards, str) else shards
    images: list[np.ndarray] = []
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
                print(f"left out: {fault}", file=sys.stderr)
                continue
            images.append(views.centre_square(image, image_size).transpose(2, 0, 1))
            labels.append(int(shard.labels[member]))
            seen += 1
            if len(images) == batch_size:
                yield torch.from_numpy(np.stack(images)), torch.tensor(labels)
                images, labels = [], []
    if images:
        yield torch.from_numpy(np.stack(images)), torch.tensor(labels)
