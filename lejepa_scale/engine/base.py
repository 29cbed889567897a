"""The interface between the step and an engine. An engine hands out and takes in this rank's own shards of the state,
and never gathers: what a checkpoint makes of them is the checkpoint's business."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lejepa_scale.model import LeJEPA, Replay

Factory = Callable[[], LeJEPA]
VALUE = "value"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, by torch's names
MOMENTUM = "momentum_buffer"  # Muon's only one, likewise
KINDS_OF_MOMENTS = (*MOMENTS, MOMENTUM)
AVERAGE = "average"  # of the values, along the way


@dataclass(frozen=True)
class Shard:
    """One rank's part of a parameter, or of a moment of it: elements start, start + 1, ... of the flattened whole."""

    name: str
    kind: str  # VALUE, one of KINDS_OF_MOMENTS, or AVERAGE
    shape: tuple[int, ...]  # of the whole
    start: int
    data: Float[Tensor, " n"]  # fp32; none of them where this rank has no part


class Update(NamedTuple):
    """What became of an optimizer step, on the device."""

    grad_norm: Float[Tensor, ""]  # global, before clipping
    finite: Bool[Tensor, ""]  # if not, nothing was updated, on any rank


class Engine(ABC):
    """Trains the module a factory builds. Gradients are averaged over all ranks; every rank calls every method.

    `module` is the bare module: its parameter names are those of checkpoints, its tensors may be shards. A new engine holds
    NaN until its shards are taken in, so that a weight nobody loads shows at the first step.
    """

    module: LeJEPA
    device: torch.device
    moments: dict[str, tuple[str, ...]]  # which the optimizer keeps of every parameter, from the first update on

    @abstractmethod
    def forward(
        self, views: Sequence[Tensor], step: int | None, replay: Replay | None = None, lambda_: float | None = None
    ) -> dict[str, Tensor]:
        """The module's outputs for views [V, B, 3, H, W] of every size, in the engine's precision. lambda_: of this step, a
        Python number, so that nobody waits for it and no precision rounds it; None: that of the configuration."""

    @torch.no_grad()
    def encode(self, views: Sequence[Tensor]) -> Float[Tensor, "v b e"]:
        """Features of all views, without a graph: the first pass of a replayed step."""
        return self.forward(views, None)["features"]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, `forward` and `encode` are those of the trained network: without graphs and stochastic depth, encoders'
        batch normalization by its running averages. Compiled blocks run as they are written, since other sizes than the
        training's would be compiled anew."""
        self.module.eval()
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self.module.train()

    @abstractmethod
    def backward(self, loss: Float[Tensor, ""], last_micro_batch: bool) -> None:
        """Accumulate gradients. The caller has divided `loss` by the number of micro-batches."""

    @abstractmethod
    def step(self, lr: float, weight_decay: float) -> Update:
        """Clip, update, clear gradients."""

    @abstractmethod
    def shards(self) -> Iterator[Shard]:
        """This rank's part of every parameter and, once there are any, of its moments: the same names in the same order on
        every rank. Data may be the live tensors."""

    @abstractmethod
    def take(self, shard: Shard) -> None:
        """Put the data of one of this engine's `shards` in its place. `settle` follows the last one."""

    @abstractmethod
    def settle(self) -> None:
        """All shards are in their place: make what follows from them, such as copies in the compute precision."""

    @abstractmethod
    def prepare_moments(self, updates: int) -> None:
        """Create zero moments that have seen `updates` updates, for `take`."""

    @abstractmethod
    def updates(self) -> int:
        """Optimizer updates applied so far: AdamW's bias correction."""

    @abstractmethod
    def close(self) -> None:
        """Let go of all that holds the process group, which can then be left. The engine cannot be used afterwards."""

    def buffers(self) -> dict[str, Tensor]:
        """The module's persistent buffers by name: live tensors, the same on every rank."""
        return {
            f"{prefix}.{name}" if prefix else name: buffer
            for prefix, module in self.module.named_modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        }


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter, also where ZeRO-3 has emptied it between uses."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
