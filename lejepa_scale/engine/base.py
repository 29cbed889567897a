"""The interface between the loop and an engine, and the canonical state that all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from lejepa_scale.checkpoint.state import MOMENTS, CanonicalState
from lejepa_scale.errors import UserError
from lejepa_scale.model import LeJEPA, Replay
from lejepa_scale.parallel.process_group import rank, world_size

Factory = Callable[[], LeJEPA]


class Engine(ABC):
    """Trains the module a factory builds. Gradients are averaged over all ranks; every rank calls every method.

    `module` is the bare module: its parameter names are the canonical ones, its tensors may be shards.
    """

    module: LeJEPA
    device: torch.device

    @abstractmethod
    def forward(self, views: Sequence[Tensor], step: int | None, replay: Replay | None = None) -> dict[str, Tensor]:
        """The module's outputs, in the engine's precision."""

    @torch.no_grad()
    def encode(self, views: Sequence[Tensor]) -> Float[Tensor, "v b e"]:
        """Features of all views, without a graph: the first pass of a replayed step."""
        return self.forward(views, None)["features"]

    @abstractmethod
    def backward(self, loss: Tensor, last_micro_batch: bool) -> None:
        """Accumulate gradients. The caller has divided `loss` by the number of micro-batches."""

    @abstractmethod
    def step(self, lr: float, weight_decay: float) -> Tensor:
        """Clip, update, clear gradients; the global gradient norm before clipping, on the device. If that is not finite,
        nothing was updated, on any rank."""

    @abstractmethod
    def _gather(self, parameter: nn.Parameter, moment: str | None) -> Tensor:
        """The full fp32 parameter, or its moment, on every rank."""

    @abstractmethod
    def _scatter(self, parameter: nn.Parameter, full: Tensor, moment: str | None) -> None:
        """Keep this rank's part of a full tensor that every rank holds."""

    @abstractmethod
    def _prepare_moments(self, updates: int) -> None:
        """Create zero optimizer state that has seen `updates` updates."""

    @abstractmethod
    def updates(self) -> int:
        """Optimizer updates applied so far."""

    def _persistent_buffers(self) -> Iterator[tuple[str, Tensor]]:
        parameters = {name for name, _ in self.module.named_parameters()}
        buffers = dict(self.module.named_buffers())
        for name in self.module.state_dict(keep_vars=True):
            if name not in parameters:
                yield name, buffers[name]

    def save(self) -> CanonicalState | None:
        """Collect the state on rank 0 (None elsewhere)."""
        updates = self.updates()
        kinds: list[str | None] = [None, *(MOMENTS if updates else ())]
        collected: dict[str | None, dict[str, Tensor]] = {kind: {} for kind in kinds}
        for name, parameter in self.module.named_parameters():
            for kind in kinds:
                full = self._gather(parameter, kind)
                if rank() == 0:
                    collected[kind][name] = full.detach().to("cpu", torch.float32, copy=True).contiguous()
        if rank() != 0:
            return None
        model = collected.pop(None)
        model |= {name: buffer.detach().to("cpu", copy=True) for name, buffer in self._persistent_buffers()}
        return CanonicalState(model, {str(kind): tensors for kind, tensors in collected.items()}, updates)

    @torch.no_grad()
    def load(self, state: CanonicalState | None) -> None:
        """Distribute the state that rank 0 holds. Names and shapes must match exactly; raises UserError."""
        parameters = dict(self.module.named_parameters())
        buffers = dict(self._persistent_buffers())
        header: list[Any] = [None]
        if state is not None:
            expected = {n: tuple(full_shape(p)) for n, p in parameters.items()}
            expected |= {n: tuple(b.shape) for n, b in buffers.items()}
            found = {n: tuple(t.shape) for n, t in state.model.items()}
            header = [(_mismatch(expected, found), bool(state.moments), state.updates)]
        _broadcast_objects(header)
        fault, has_moments, updates = header[0]
        if fault:
            raise UserError(fault)
        if has_moments:
            self._prepare_moments(updates)
        for name, parameter in parameters.items():
            for kind in [None, *(MOMENTS if has_moments else ())]:
                source = None
                if state is not None:
                    source = (state.model if kind is None else state.moments[kind])[name]
                self._scatter(parameter, self._broadcast(source, full_shape(parameter), torch.float32), kind)
        for name, buffer in buffers.items():
            buffer.copy_(self._broadcast(None if state is None else state.model[name], buffer.shape, buffer.dtype))

    def _broadcast(self, source: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Rank 0's tensor, on this device, on every rank."""
        if source is not None:
            full = source.to(self.device, dtype).contiguous()
        else:
            full = torch.empty(tuple(shape), device=self.device, dtype=dtype)
        if world_size() > 1:
            dist.broadcast(full, src=0)
        return full


def full_shape(parameter: nn.Parameter) -> Sequence[int]:
    """Shape of the whole parameter, also where ZeRO-3 has emptied it between uses."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _broadcast_objects(objects: list[Any]) -> None:
    if world_size() > 1:
        dist.broadcast_object_list(objects, src=0)


def _mismatch(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> str | None:
    if expected == found:
        return None
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    shapes = [f"{n}: {found[n]} instead of {expected[n]}" for n in sorted(expected.keys() & found.keys())]
    shapes = [s for s, n in zip(shapes, sorted(expected.keys() & found.keys()), strict=True) if expected[n] != found[n]]
    parts = [
        f"{what} {len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unexpected", extra), ("other shapes", shapes))
        if names
    ]
    return (
        f"the saved weights do not belong to this model: {'; '.join(parts)}. The model section of the configuration "
        "must be the one the checkpoint was made with."
    )
