"""An average of the weights along the way: of every shard its own, beside the engine that trains it, outside the loss and
the gradient. Takes no collective."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from lejepa_scale.engine.base import AVERAGE, VALUE, Engine, Shard


class Average:
    """Averaged weights in fp32, and averaged buffers: their running statistics.

    kind: `ema`, an exponential average; `swa`, the plain mean of the weights at every update (stochastic weight averaging,
    arXiv 1803.05407). decay: share that an exponential average keeps of itself in a step; lower while it is young:
    min(decay, (1 + n) / (10 + n)) after n steps, as TensorFlow has it, so that the first weights are soon forgotten. every:
    steps between two updates, over which the decay of a step adds up.

    Holds 4 bytes for every parameter of this rank's shards, on the device of these, from the first update on.
    """

    def __init__(self, engine: Engine, kind: Literal["ema", "swa"], decay: float = 0.9999, every: int = 1) -> None:
        self._engine, self.kind, self.decay, self.every = engine, kind, decay, every
        self.updates = 0
        self._held: dict[str, Tensor] = {}  # flat, by parameter
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now; the first time they are the average."""
        if not self.updates:
            self.prepare(1)
            for shard in self._values():
                self._held[shard.name].copy_(shard.data)
            for name, buffer in self._engine.buffers().items():
                self._buffers[name].copy_(buffer)
            return
        weight = self._weight()
        self.updates += 1
        shards = [shard for shard in self._values() if len(shard.data)]
        torch._foreach_lerp_([self._held[shard.name] for shard in shards], [shard.data for shard in shards], weight)
        for name, buffer in self._engine.buffers().items():
            if buffer.is_floating_point():
                self._buffers[name].lerp_(buffer, weight)
            else:  # a count
                self._buffers[name].copy_(buffer)

    def _weight(self) -> float:
        """Of the weights as they are now."""
        if self.kind == "swa":
            return 1 / (self.updates + 1)
        steps = self.updates * self.every
        return 1 - min(self.decay, (1 + steps) / (10 + steps)) ** self.every

    def prepare(self, updates: int) -> None:
        """Memory for an average of so many updates, for `take`."""
        self.updates = updates
        self._held = {shard.name: torch.empty_like(shard.data) for shard in self._values()}
        self._buffers = {name: torch.empty_like(buffer) for name, buffer in self._engine.buffers().items()}

    def shards(self) -> Iterator[Shard]:
        """This rank's part of every averaged parameter, live; none before the first update."""
        if self.updates:
            for shard in self._values():
                yield replace(shard, kind=AVERAGE, data=self._held[shard.name])

    def take(self, shard: Shard) -> None:
        """Put the data of one of `shards` in its place."""
        self._held[shard.name].copy_(shard.data)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, the engine computes with the average; the weights that it trains are back afterwards, bit for bit. Takes
        memory for one shard. For after the first update; every rank calls, where a forward pass is one of all ranks."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for shard in self._values():
            held = self._held[shard.name]
            others = shard.data.clone()
            self._engine.take(replace(shard, data=held))
            held.copy_(others)
        for name, buffer in self._engine.buffers().items():
            others = buffer.clone()
            buffer.copy_(self._buffers[name])
            self._buffers[name].copy_(others)
        self._engine.settle()

    def buffers(self) -> dict[str, Tensor]:
        """Averaged buffers by name: live tensors, the same on every rank."""
        return self._buffers

    def _values(self) -> Iterator[Shard]:
        return (shard for shard in self._engine.shards() if shard.kind == VALUE)
