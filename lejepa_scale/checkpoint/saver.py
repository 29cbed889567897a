"""Saving while the training goes on. Every rank copies what it has to write into host memory, which is all that a step waits
for, and writes it from a thread; at the boundaries of steps the ranks tell one another how far they are."""

from __future__ import annotations

import errno
import platform
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor

from lejepa_scale.checkpoint import places
from lejepa_scale.checkpoint.files import Entry, Written, write_safetensors, write_text
from lejepa_scale.checkpoint.layout import Layout, boxes, divided, key
from lejepa_scale.checkpoint.places import Place
from lejepa_scale.checkpoint.saved import (
    CONFIG,
    INDEX,
    PROBE,
    STATE,
    Progress,
    file_of,
    index_text,
    not_finite,
    state_text,
    title,
)
from lejepa_scale.checkpoint.store import Store
from lejepa_scale.engine import Average
from lejepa_scale.engine.base import AVERAGE, MOMENTS, MOMENTUM, VALUE, Engine
from lejepa_scale.errors import UserError
from lejepa_scale.parallel import collectives, process_group
from lejepa_scale.parallel.threads import started
from lejepa_scale.parallel.waiting import Told

T = TypeVar("T")
Tensors = list[tuple[str, tuple[int, ...], Tensor]]  # key, shape, elements
_ADVICE = {
    errno.ENOSPC: " The disk is full: make room, or lower checkpoint.keep.",
    errno.EDQUOT: " The quota is used up: make room, or lower checkpoint.keep.",
    errno.EROFS: " The file system is read-only: give another run.dir, or mount it for writing.",
    errno.EACCES: " Give another run.dir, or the right to write there.",
    errno.EPERM: " Give another run.dir, or the right to write there.",
    errno.ENAMETOOLONG: " Give a run.dir with a shorter path.",
    errno.ENOENT: " The folder has vanished while it was written to: check that its disk is still mounted.",
    errno.ESTALE: " The folder was replaced, or its server restarted: check the mount.",
}
_OF_A_STORE = "Check the address, the right to write there, and the credentials that its library finds on every node."
_NOT_FINITE = "are not finite"  # what saved.not_finite says
_POLL_SECONDS = 0.002, 1.0  # between two looks at a save that is waited for: at first, at last


@dataclass
class _Flight:
    """A save that is under way."""

    step: int
    partial: Place
    now: Future[Any]  # this rank's files; once every rank has written its own, what rank 0 makes of them
    completing: bool = False


class NotSaved(UserError):
    """A save has failed, and left nothing; what was saved before is as it was."""


class Saver:
    """Saves an engine's state, with the average of its weights where one is kept; every rank calls every method, in the same
    order. At most one save is in flight. staged: copy it first, so that steps may go on meanwhile; else no tensor may
    change before `finish` has returned.

    `Future`s of ranks are never waited for inside a collective, so that a slow disk is no lost rank.
    """

    def __init__(self, store: Store, engine: Engine, average: Average | None = None, *, staged: bool = True) -> None:
        self.store, self.engine, self.average, self._staged = store, engine, average, staged
        self._layout: Layout | None = None
        self._flight: _Flight | None = None
        self._held: dict[tuple[str, str], Tensor] = {}  # host memory, used again by every save

    @property
    def in_flight(self) -> bool:
        return self._flight is not None

    def begin(
        self,
        progress: Progress,
        probe: dict[str, Tensor],
        config_yaml: str,
        metrics: Mapping[str, float | None] | None = None,
    ) -> None:
        """Copy the state, and begin to write it. metrics: what was last measured. Raises UserError, on every rank, where
        there is no room or the folder cannot be made; the save before must have been finished."""
        assert self._flight is None, "a save is in flight"
        averages = self.average if self.average is not None and self.average.updates else None
        progress = replace(
            progress, updates=self.engine.updates(), averaged=averages.updates if averages is not None else 0
        )
        if self._layout is None:
            self._layout = layout_of(self.engine)
        layout, mine = self._layout, self._layout.of_rank(process_group.rank())
        shards = [*self.engine.shards(), *(averages.shards() if averages is not None else ())]
        kinds = list(dict.fromkeys(shard.kind for shard in shards))
        partial = self._folder(progress.step, 4 * sum(prod(shard.shape) for shard in shards))
        files: dict[str, Tensors] = {}
        for shard in shards:
            if (part := mine.get(shard.name)) is None:
                continue
            assert (part.start, part.length) == (shard.start, len(shard.data)), f"the parts of {shard.name} have moved"
            elements = self._copied((shard.kind, shard.name), shard.data)
            tensors = files.setdefault(file_of(shard.kind, part.rank, layout.ranks), [])
            at = 0
            for box in boxes(shard.shape, part.start, part.length):
                shape = tuple(side.stop - side.start for side in box)
                name = key(title(shard.kind, shard.name), shard.shape, box)
                tensors.append((name, shape, elements[at : at + prod(shape)]))
                at += prod(shape)
        texts: dict[str, str] = {}
        if process_group.rank() == 0:
            buffers = self.engine.buffers()
            for kind, tensors_of in ((VALUE, buffers), (AVERAGE, averages.buffers() if averages is not None else {})):
                whole = [(name, tuple(x.shape), self._copied((kind, name), x)) for name, x in tensors_of.items()]
                if whole:
                    files.setdefault(file_of(kind, 0, layout.ranks), []).extend(whole)
            if not progress.updates:
                files.setdefault(file_of(MOMENTS[0], 0, layout.ranks), [])
            if probe:
                files[PROBE] = [(name, tuple(x.shape), self._copied((PROBE, name), x)) for name, x in probe.items()]
            shapes = {name: tuple(x.shape) for name, x in buffers.items()}
            texts = {
                INDEX: index_text(layout, shapes, kinds, {shard.name for shard in shards if shard.kind == MOMENTUM}),
                STATE: state_text(
                    progress,
                    ranks=layout.ranks,
                    torch=torch.__version__,
                    python=platform.python_version(),
                    metrics=dict(metrics or {}),
                ),
                CONFIG: config_yaml,
            }
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)
        self._flight = _Flight(progress.step, partial, started(lambda: _write(partial, files, texts)))

    def poll(self) -> Place | None:
        """The checkpoint, where the save in flight has just become complete. Takes a small collective. Raises UserError, on
        every rank, with what went wrong on any."""
        flight = self._flight
        if flight is None:
            return None
        done = collectives.all_reduce_sum(torch.tensor(int(flight.now.done())))
        if int(done) < process_group.world_size():
            return None
        outcomes = collectives.gather_objects(_outcome(flight.now))
        if failures := list(dict.fromkeys(failure for _, failure in outcomes if failure)):
            self._flight = None
            if process_group.rank() == 0:
                with suppress(*places.faults(flight.partial)):
                    self.store.discard(flight.partial)
            untouched = self._untouched() if process_group.rank() == 0 else ""
            kind = UserError if any(_NOT_FINITE in failure for failure in failures) else NotSaved
            error = kind(f"step {flight.step} is not saved: {' '.join(failures)} ({untouched}.)")
            error.everywhere = True
            raise error
        if flight.completing:
            self._flight = None
            return self.store.root / outcomes[0][0]
        flight.completing, flight.now = True, _nothing()
        if process_group.rank() == 0:
            files = {name: written for found, _ in outcomes for name, written in found.items()}
            flight.now = started(lambda: _named(lambda: self.store.finish(flight.partial, files).name, flight.partial))
        return None

    def finish(self) -> Place | None:
        """Wait for the save in flight, however long its disk takes. None where there is none. Raises what `poll` does."""
        began, path, told = time.monotonic(), None, Told("waiting for the checkpoint to be written")
        while self._flight is not None:
            path = self.poll()
            if self._flight is not None:
                told.look()
                time.sleep(min(_POLL_SECONDS[1], max(_POLL_SECONDS[0], 0.1 * (time.monotonic() - began))))
        return path

    def _folder(self, step: int, nbytes: int) -> Place:
        root = self.store.root
        try:
            begun = collectives.on_rank_zero(
                lambda: _named(lambda: self.store.begin(step, nbytes).name, root), "making room for a checkpoint"
            )
            return root / begun
        except UserError as error:
            refused = NotSaved(f"step {step} is not saved: {error}")
            refused.everywhere = True
            raise refused from error

    def _untouched(self) -> str:
        try:
            last = self.store.latest()
        except UserError:  # the store is out of reach
            return "those before it are untouched"
        return f"{last} is untouched" if last else "there is no checkpoint before it"

    def _copied(self, name: tuple[str, str], data: Tensor) -> Tensor:
        """The same elements in host memory, flat."""
        data = data.detach()
        if not self._staged:
            return data.reshape(-1).cpu()
        held = self._held.get(name)
        if held is None or held.numel() != data.numel():
            held = self._held[name] = torch.empty(data.numel(), dtype=data.dtype, pin_memory=data.is_cuda)
        return held.copy_(data.reshape(-1), non_blocking=True)


def layout_of(engine: Engine) -> Layout:
    """Who writes what. Every rank calls."""
    values = [shard for shard in engine.shards() if shard.kind == VALUE]
    held = torch.tensor([(shard.start, len(shard.data)) for shard in values])
    return divided({shard.name: shard.shape for shard in values}, collectives.all_gather(held).numpy())


def _write(partial: Place, files: dict[str, Tensors], texts: dict[str, str]) -> dict[str, Written]:
    """This rank's files. Raises UserError for what is not to be written, and where that fails."""
    for tensors in files.values():
        if fault := not_finite((name, elements) for name, _, elements in tensors):
            raise UserError(f"{fault}.")
    return _named(
        lambda: (
            {
                name: write_safetensors(partial / name, [Entry.of(*tensor) for tensor in tensors])
                for name, tensors in files.items()
            }
            | {name: write_text(partial / name, text) for name, text in texts.items()}
        ),
        partial,
    )


def _named(work: Callable[[], T], where: Place) -> T:
    """What the system or a store refuses, as a paragraph."""
    try:
        return work()
    except UserError:
        raise
    except places.faults(where) as error:
        number, named = getattr(error, "errno", None), getattr(error, "filename", None)
        if not places.is_local(where):
            raise UserError(f"cannot write {where}: {places.said(error)}. {_OF_A_STORE}") from error
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot write{f' {named}' if named else ''}: {reason}.{_ADVICE.get(number or 0, '')}"
        ) from error


def _outcome(future: Future[Any]) -> tuple[Any, str]:
    """What a rank tells the others."""
    try:
        return future.result(), ""
    except UserError as error:
        return None, str(error)
    except Exception as error:
        return None, f"rank {process_group.rank()} failed: {error!r}."


def _nothing() -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(None)
    return future
