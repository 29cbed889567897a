"""A step's micro-batches out of the loader, for all ranks together: a rank that cannot read stops all of them, with its own
words. Notes what the step was made of; never looks at the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lejepa_scale.config import BatchPlan
from lejepa_scale.data import Batch, Beside
from lejepa_scale.data.audit.keylog import KeyLog
from lejepa_scale.data.faults import Fault
from lejepa_scale.errors import UserError
from lejepa_scale.parallel import collectives

Phase = Callable[[str], AbstractContextManager[None]]


class Feed:
    """`of_step(n)` gives what `train_step` takes; afterwards `samples` (shard and key) and `labels` are those of the step
    on this rank, and `faults` the samples that any rank had to replace. The next micro-batch is asked for as soon as the
    backward pass of the one before is under way: while the device is at work, its views are made there and the ranks tell
    one another whether they could read. beside: whether views are made ahead, which costs the memory of one more batch of
    float views. phase: wraps waiting and colours, by name, for whoever times them."""

    def __init__(
        self,
        batches: Iterator[Batch],
        plan: BatchPlan,
        device: torch.device,
        key_log: KeyLog | None = None,
        phase: Phase = lambda name: nullcontext(),
        *,
        beside: bool = True,
    ) -> None:
        self.batches, self.plan, self.device, self.key_log, self.phase = batches, plan, device, key_log, phase
        self.beside = Beside(device) if beside and device.type == "cuda" else None
        self.samples: list[str] = []
        self.labels: list[Tensor] = []
        self.faults: list[Fault] = []
        self._ahead: _Asked | None = None

    def of_step(self, number: int, *, more: bool = True) -> Iterator[Callable[[], list[Tensor]]]:
        """The micro-batches of step `number`, each as what makes its views on the device. more: another step follows.
        Raises UserError on every rank where one cannot read."""
        self.samples, self.labels, self.faults = [], [], []
        for micro in range(self.plan.accumulation):
            batch = self._next()
            if self.key_log is not None:
                self.key_log.write(number, batch.records)
            self.samples += [record.said for record in batch.records]
            self.labels.append(batch.labels)
            yield partial(self._views, batch)
            if more or micro + 1 < self.plan.accumulation:
                self._ahead = self._ask()

    def close(self) -> None:
        """Nothing is under way afterwards. Every rank calls, unless the run has failed."""
        if self._ahead is not None:
            self._ahead.flags()
            self._ahead = None

    def _views(self, batch: Batch) -> list[Tensor]:
        with self.phase("colours"):
            return batch.augmented(self.device)

    def _ask(self) -> _Asked:
        """For the next batch of this rank, and begin to tell the others what came."""
        batch, failure = None, None
        with self.phase("data wait"):
            try:
                batch = next(self.batches)
            except UserError as error:
                failure = error
        flags = collectives.begin_sum(torch.tensor([len(batch.skipped) if batch else 0, int(failure is not None)]))
        if batch is not None and self.beside is not None:
            with self.phase("colours"):
                batch = self.beside.begin(batch)
        return _Asked(batch, failure, flags)

    def _next(self) -> Batch:
        asked, self._ahead = self._ahead or self._ask(), None
        with self.phase("other ranks"):
            faults, failures = asked.flags().tolist()
        if failures:
            messages = [text for text in collectives.gather_objects(str(asked.failure or "")) if text]
            raised = UserError(" ".join(dict.fromkeys(messages)))
            raised.everywhere = True
            raise raised
        assert asked.batch is not None
        if faults:
            self.faults += [fault for of_rank in collectives.gather_objects(asked.batch.skipped) for fault in of_rank]
        return asked.batch


@dataclass(frozen=True)
class _Asked:
    """A micro-batch of this rank, or why there is none; how many samples of all ranks were replaced, and how many ranks
    could not read, once they have told."""

    batch: Batch | None
    failure: UserError | None
    flags: Callable[[], Tensor]
