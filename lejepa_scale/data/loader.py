"""Batches of views for a rank, for ever: composes order, bytes, decoding, crops and colours. Its whole state is the
number of the next step, advanced by the trainer."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from concurrent.futures import Future
from functools import partial
from multiprocessing.util import Finalize
from types import TracebackType

import cv2
import numpy as np
import torch
from jaxtyping import Float, Real
from torch.utils.data import DataLoader, Dataset, get_worker_info

from lejepa_scale.config import BatchPlan, Data
from lejepa_scale.data import watch, workers
from lejepa_scale.data.batch import Batch
from lejepa_scale.data.faults import Fault, SampleFault, printable
from lejepa_scale.data.images import photometric, pixels, views
from lejepa_scale.data.images.decode import decode
from lejepa_scale.data.index.scan import ShardIndex
from lejepa_scale.data.mixture import Mixture, name_of, reader_of
from lejepa_scale.data.order import Location, Order, positions
from lejepa_scale.data.samples import read_ahead, read_image
from lejepa_scale.errors import UserError

_SHOWN = 5  # shards that an error lists


class _Samples(Dataset[Batch]):
    def __init__(self, mixture: Mixture, data: Data, seed: int, skip: Collection[str]) -> None:
        self.mixture, self.seed, self.skip = mixture, seed, frozenset(skip)
        self.reader, self.max_faults, self.max_pixels = reader_of(data), data.max_faults, data.max_pixels
        self.order = Order(mixture.counts, mixture.weights, seed, data.shuffle_block)
        self.groups = [group for group in (data.views.global_, data.views.local) if group.count]
        self.enough = views.min_resolution(self.groups)
        self.augment, self.pixels = data.augment, pixels.of_sources(data)
        self.channels, self.dtype = data.channels, pixels.dtype_of_views(data)

    def __getitems__(self, where: list[int]) -> Batch:
        skipped: list[Fault] = []
        cut = [torch.empty(g.count, len(where), self.channels, g.size, g.size, dtype=self.dtype) for g in self.groups]
        colours = [np.empty((g.count, len(where), photometric.DRAWS)) for g in self.groups]
        if get_worker_info() is not None:  # a worker's tensors go there anyway; on the heap they would fragment it
            cut = [tensor.share_memory_() for tensor in cut]
        labels, keys, records = [], [], []
        locations = self.order.locate(where)
        ahead = [read_ahead(self.reader, self._shard(location), location.member) for location in locations]
        for b, (position, location) in enumerate(zip(where, locations, strict=True)):
            watch.at(position)
            image, shard, member = self._image(location, ahead[b], skipped)
            for i, (group, draws) in enumerate(zip(self.groups, self._draws(location), strict=True)):
                cut[i][:, b] = views.cut_views(image, group, draws[:, : views.DRAWS])
                colours[i][:, b] = draws[:, views.DRAWS :]
            labels.append(self.mixture.classes.of(shard, member))
            keys.append(shard.key(member))
            records.append(self.mixture.record(position, location, keys[-1]))
        watch.at(None)
        drawn = [photometric.draw(x.reshape(-1, photometric.DRAWS), self.augment) for x in colours]
        parameters = [torch.from_numpy(d).view(*x.shape[:2], -1) for d, x in zip(drawn, colours, strict=True)]
        return Batch(cut, parameters, torch.tensor(labels), keys, skipped, records, self.pixels[0])

    def _draws(self, location: Location) -> Iterator[Float[np.ndarray, "_views draws"]]:
        """Uniform numbers of each group, for crops and then for colours, a row per view: a function of (seed, epoch,
        sample, group, view), so that a further view, or a group without any, changes no other."""
        key = np.random.SeedSequence((self.seed, 2, *location)).generate_state(2, np.uint64)
        for number, group in enumerate(self.groups):
            generator = np.random.Generator(np.random.Philox(key=key, counter=(0, 0, 0, number)))
            yield generator.random((group.count, views.DRAWS + photometric.DRAWS))

    def _shard(self, location: Location) -> ShardIndex:
        return self.mixture.shards[location.source][location.shard]

    def _image(
        self, location: Location, ahead: Future[bytes] | None, faults: list[Fault]
    ) -> tuple[Real[np.ndarray, "h w c"], ShardIndex, int]:
        """The image at `location`; where it cannot be used, the next of its shard that can (so the replacement does
        not depend on ranks or workers)."""
        shard = self._shard(location)
        attempts = min(self.max_faults, len(shard))
        for attempt in range(attempts):
            member = (location.member + attempt) % len(shard)
            try:
                if self.skip and name_of(shard, member) in self.skip:
                    raise SampleFault("train.skip_samples leaves it out")
                data = read_image(self.reader, shard, member, ahead)
                return decode(data, self.enough, self.max_pixels, self.pixels[location.source]), shard, member
            except SampleFault as error:
                faults.append(Fault(shard.url, shard.key(member), int(shard.offsets[member]), str(error)))
                ahead = None
        first, last = faults[-attempts], faults[-1]
        raise UserError(
            f"{attempts} images in a row of shard {shard.url} cannot be used (data.max_faults = {self.max_faults}), from "
            f"{printable(first.key)} to {printable(last.key)}: {last.reason}. A shard that is damaged is to be "
            "written again, or removed from data.shards."
        )


class _Names(_Samples):
    """The same samples, unread: batches without views."""

    def __getitems__(self, where: list[int]) -> Batch:
        found = self.order.locate(where)
        keys = [self._shard(x).key(x.member) for x in found]
        records = [self.mixture.record(*drawn) for drawn in zip(where, found, keys, strict=True)]
        return Batch([], [], torch.empty(0, dtype=torch.long), keys, [], records)


class Loader:
    """This rank's micro-batches from `first_step` on, for ever, `plan.accumulation` of them per step: a pure function of the
    arguments. `mixture` is what `open_mixture(data)` found. `skip`: names of
    samples that others take the place of. `decode=False`: batches name their samples and hold no views.
    `timeout`: seconds that a batch is waited for while its worker lives; one that is killed, or shows no sign of life for
    data.read_timeout and 5 s, is waited for no longer.

    Used as a context manager, or closed, it leaves no process behind. Raises UserError where `plan` has no such rank; when
    iterated, where a shard is lost or no batch comes.
    """

    def __init__(
        self,
        mixture: Mixture,
        data: Data,
        plan: BatchPlan,
        *,
        seed: int,
        rank: int = 0,
        first_step: int = 0,
        pin_memory: bool = False,
        decode: bool = True,
        timeout: float = 600.0,
        skip: Collection[str] = (),
    ) -> None:
        if not 0 <= rank < plan.ranks:
            raise UserError(
                f"rank = {rank} of a plan for {plan.ranks} rank(s): ranks count from 0 to {plan.ranks - 1}."
            )
        self.plan, self.rank, self.first_step, self.timeout = plan, rank, first_step, timeout
        self._workers, self._prefetch, self._pin_memory = data.workers, data.prefetch, pin_memory
        self._read_timeout = data.read_timeout
        self._samples = (_Samples if decode else _Names)(mixture, data, seed, skip)
        self._running: list[Finalize] = []
        cv2.setNumThreads(1)  # workers and ranks are the parallelism

    def __iter__(self) -> Iterator[Batch]:
        """This rank's micro-batches, `accumulation` of them per step. The workers start with the first one."""
        board = watch.Board(self._workers)
        batches = iter(self._dataloader(board))
        workers.leave_to_us(batches)
        end = workers.ending(batches)
        self._running.append(end)
        watched = None
        if self._workers:
            silence = self._read_timeout + watch.GRACE_SECONDS
            running = batches._workers  # type: ignore[attr-defined]
            watched = watch.Watch(partial(next, batches), running, board, silence=silence, patience=self.timeout)
        taken = 0
        try:
            while True:
                yield watched.next(taken % self._workers) if watched else next(batches)
                if not end.still_active():
                    return
                taken += 1
        except UserError as error:  # a worker's error arrives with its traceback; the last line is the message
            raise UserError(str(error).strip().rpartition("UserError: ")[2]) from None
        except watch.Lost as lost:
            if not end.still_active():  # closed meanwhile, by another thread
                return
            raise UserError(self._lost(lost, board, taken)) from None
        finally:
            end()
            self._running.remove(end)
            if watched:
                watched.close()

    def close(self) -> None:
        """End every worker, whatever it is doing, within seconds; iterators that are under way end with it."""
        for end in list(self._running):
            end()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _dataloader(self, board: watch.Board) -> DataLoader[Batch]:
        from_main_thread = threading.current_thread() is threading.main_thread()
        return DataLoader(
            self._samples,
            batch_sampler=_Positions(self.plan, self.rank, self.first_step),  # type: ignore[arg-type]
            collate_fn=_same,  # type: ignore[arg-type]
            num_workers=self._workers,
            prefetch_factor=self._prefetch if self._workers else None,
            persistent_workers=False,
            worker_init_fn=partial(workers.started, board, from_main_thread),
            pin_memory=self._pin_memory,
        )

    def _lost(self, lost: watch.Lost, board: watch.Board, taken: int) -> str:
        """What the worker was on, and where the batch that does not come was to be read from."""
        step, micro = divmod(taken, self.plan.accumulation)
        step += self.first_step
        order, sources = self._samples.order, self._samples.mixture.shards
        if (position := board.position(lost.worker)) is not None:
            (at,) = order.locate([position])
            shard = sources[at.source][at.shard]
            on = f"on sample {printable(shard.key(at.member))} of shard {printable(shard.url)}"
        else:
            where = order.locate(list(positions(step, micro, self.rank, self.plan)))
            shards = list(dict.fromkeys(sources[x.source].urls[x.shard] for x in where))
            more = f" and {len(shards) - _SHOWN} more" if len(shards) > _SHOWN else ""
            on = f"between two batches; the one that is missing is read from {printable(', '.join(shards[:_SHOWN]))}{more}"
        sentences = (
            f"no batch came for step {step}: worker {lost.worker} of rank {self.rank} {lost.what}. It was {on}.",
            lost.advice,
            "The same command goes on from the last checkpoint.",
        )
        return " ".join(filter(None, sentences))


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
