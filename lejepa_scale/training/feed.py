"""A step's micro-batches out of the loader, for all ranks together: a rank that cannot read stops all of them, with its own
words. Notes what the step was made of; never looks at the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from lejepa_scale.config import BatchPlan
from lejepa_scale.data import Batch
from lejepa_scale.data.audit.keylog import KeyLog
from lejepa_scale.data.faults import Fault
from lejepa_scale.errors import UserError
from lejepa_scale.parallel import collectives

Phase = Callable[[str], AbstractContextManager[None]]


class Feed:
    """`of_step(n)` gives what `train_step` takes; afterwards `keys` and `labels` are those of the step's samples on
    this rank, and `faults` the samples that any rank had to replace. phase: wraps waiting and colours, by name, for
    whoever times them."""

    def __init__(
        self,
        batches: Iterator[Batch],
        plan: BatchPlan,
        device: torch.device,
        key_log: KeyLog | None = None,
        phase: Phase = lambda name: nullcontext(),
    ) -> None:
        self.batches, self.plan, self.device, self.key_log, self.phase = batches, plan, device, key_log, phase
        self.keys: list[str] = []
        self.labels: list[Tensor] = []
        self.faults: list[Fault] = []
        self._waited = 0.0

    def of_step(self, number: int) -> Iterator[Callable[[], list[Tensor]]]:
        """The micro-batches of step `number`, each as what makes its views on the device. Raises UserError on every
        rank where one cannot read."""
        self.keys, self.labels, self.faults = [], [], []
        for _ in range(self.plan.accumulation):
            with self.phase("data wait"):
                batch = self._next()
            if self.key_log is not None:
                self.key_log.write(number, batch.records)
            self.keys += batch.keys
            self.labels.append(batch.labels)
            yield partial(self._views, batch)

    def waited(self) -> float:
        """Seconds that this rank has waited for images since this was last asked."""
        waited, self._waited = self._waited, 0.0
        return waited

    def _views(self, batch: Batch) -> list[Tensor]:
        with self.phase("colours"):
            return batch.augmented(self.device)

    def _next(self) -> Batch:
        asked = time.monotonic()
        batch, failure = None, None
        try:
            batch = next(self.batches)
        except UserError as error:
            failure = error
        self._waited += time.monotonic() - asked
        faults = batch.skipped if batch is not None else []
        noted = collectives.all_reduce_sum(torch.tensor([len(faults), int(failure is not None)]))
        if noted[1]:
            messages = [text for text in collectives.gather_objects(str(failure or "")) if text]
            raised = UserError(" ".join(dict.fromkeys(messages)))
            raised.everywhere = True
            raise raised
        if noted[0]:
            self.faults += [fault for of_rank in collectives.gather_objects(faults) for fault in of_rank]
        assert batch is not None
        return batch
