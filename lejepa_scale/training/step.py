"""One optimizer step: micro-batches in, what came of them out. Never fetches data, writes a file, prints, or looks at
signals: the trainer, every benchmark and every test of a step call it, so that what is measured is what is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lejepa_scale import seeds
from lejepa_scale.config import BatchPlan
from lejepa_scale.engine import Engine
from lejepa_scale.model import Replay
from lejepa_scale.parallel import process_group

MakeViews = Callable[
    [], Sequence[Float[Tensor, "v b c h w"]]
]  # a micro-batch's views on the device; may be called again
Phase = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class StepResult:
    """What one step gave. Tensors stay on the device, so that nobody waits who does not read them."""

    outputs: list[dict[str, Tensor]]  # of every micro-batch, detached: loss, prediction, sigreg, features, embeddings
    grad_norm: Float[Tensor, ""]  # of the whole batch, before clipping
    finite: Bool[Tensor, ""]  # if not, everything is as it was before the step, buffers too, on every rank

    @property
    def loss(self) -> Float[Tensor, ""]:
        """Mean over the micro-batches."""
        return torch.stack([out["loss"] for out in self.outputs]).mean()


def train_step(
    engine: Engine,
    plan: BatchPlan,
    micro_batches: Iterable[MakeViews],
    *,
    number: int,
    seed: int,
    lr: float,
    weight_decay: float,
    lambda_: float | None = None,
    exact: bool = False,
    phase: Phase = lambda name: nullcontext(),
) -> StepResult:
    """Forward and backward over the `plan.accumulation` micro-batches of this rank, then one update. Every rank calls.

    number: of the step, from 0, which with `seed` decides everything random. lambda_: of the objective; None: that of
    the configuration. exact: the objective is that of all
    micro-batches together (objective.accumulation), for which they are encoded without a graph first. phase: wraps the
    parts of the step, by name, for whoever times them. Raises ValueError where there are not as many micro-batches as
    planned.
    """
    # A forward pass moves running averages.
    before = {name: buffer.clone() for name, buffer in engine.buffers().items()}
    outputs = []
    for micro, (make_views, replay) in enumerate(_replayed(engine, plan, micro_batches, number, seed, exact, phase)):
        seed_micro_batch(seed, number, micro)
        views = make_views()
        with phase("forward"):
            out = engine.forward(views, number, replay, lambda_)
        with phase("backward"):
            engine.backward(out["loss"] / plan.accumulation, micro == plan.accumulation - 1)
        outputs.append({name: tensor.detach() for name, tensor in out.items()})
    if len(outputs) != plan.accumulation:
        raise ValueError(f"a step takes {plan.accumulation} micro-batches of this plan, and was given {len(outputs)}.")
    with phase("optimizer"):
        update = engine.step(lr, weight_decay)
        for name, buffer in engine.buffers().items():
            buffer.copy_(torch.where(update.finite, buffer, before[name]))  # decided on the device: nobody waits
    return StepResult(outputs, update.grad_norm, update.finite)


def _replayed(
    engine: Engine,
    plan: BatchPlan,
    micro_batches: Iterable[MakeViews],
    number: int,
    seed: int,
    exact: bool,
    phase: Phase,
) -> Iterator[tuple[MakeViews, Replay | None]]:
    """For an exact objective all micro-batches are read and encoded without a graph first, with the random numbers that the
    second pass will draw again."""
    if plan.accumulation == 1 or not exact:
        yield from ((make_views, None) for make_views in micro_batches)
        return
    held, features = list(micro_batches), []
    for micro, make_views in enumerate(held):
        seed_micro_batch(seed, number, micro)
        views = make_views()
        with phase("first pass"):
            features.append(engine.encode(views))
    for micro, make_views in enumerate(held):
        yield make_views, Replay(features, micro)


def seed_micro_batch(seed: int, step: int, micro: int) -> None:
    """What the forward pass draws (stochastic depth) follows from (seed, step, micro-batch, rank): nothing to save."""
    torch.manual_seed(seeds.of_micro_batch(seed, step, micro, process_group.rank()))
