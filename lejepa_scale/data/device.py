"""The training device's side of the loader: on CUDA the next micro-batch is copied and augmented on a stream of its own
while the current one trains. Holds one batch ahead; which steps are done is the trainer's business alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch

from lejepa_scale.data.batch import Batch

T = TypeVar("T")


def ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches; on CUDA their `augmented` views are made while the batch before is in use. Costs the memory of one
    more batch of float views. A CPU has no second stream: there views are made when they are asked for."""
    if device.type != "cuda":
        return batches
    stream = torch.cuda.Stream(device)

    def begin(batch: Batch) -> Callable[[], Batch]:
        with torch.cuda.stream(stream):
            views = batch.augmented(device)
        made = stream.record_event()

        def hand_over() -> Batch:
            current = torch.cuda.current_stream(device)
            current.wait_event(made)
            for x in views:
                x.record_stream(current)  # its memory is not reused before the trainer's kernels are done with it
            return replace(batch, ready=views)

        return hand_over

    return one_ahead(batches, begin)


def one_ahead(batches: Iterator[Batch], begin: Callable[[Batch], Callable[[], T]]) -> Iterator[T]:
    """begin(k + 1) is called before begin(k)'s result is handed over."""
    held: Callable[[], T] | None = None
    for batch in batches:
        following = begin(batch)
        if held is not None:
            yield held()
        held = following
    if held is not None:
        yield held()
