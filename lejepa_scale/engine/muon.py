"""Muon (K. Jordan and others, 2024; arXiv 2502.16982), as torch.optim.Muon computes it, also for convolutions, for matrices
that FSDP has cut, and with a step that can be left out without the host's knowing. Weights are its caller's choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from lejepa_scale.engine.base import MOMENTUM

_STEPS, _QUINTIC = 5, (3.4445, -4.7750, 2.0315)  # K. Jordan's: a x + b x^3 + c x^5 on every singular value
_SMALLEST = 1e-7  # norm that is divided by
# Of the iteration: CPUs without bf16 products would take 16 times as long in it.
_PRECISION, _ON_CPU = torch.bfloat16, torch.float32
_LONG = 3  # columns for each row, from which it is cheaper to iterate on the Gram matrix, in fp32


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonal factor of each matrix's Nesterov momentum; of a convolution's [out, in, height, width] as
    the matrix [out, in height width]. Every rank makes that of the whole matrix, which FSDP's ranks gather for it in the
    iteration's own precision: the numbers are those of one process.

    momentum: share that the average of gradients keeps of itself in a step. adjust_lr: factor of the learning rate for a
    matrix [A, B]: 0.2 sqrt(max(A, B)), at which updates have the root mean square of AdamW's (arXiv 2502.16982, section
    2.2), or sqrt(max(1, A / B)), K. Jordan's. Raises ValueError for a parameter of one dimension.
    """

    found_inf: Tensor  # as torch's gradient scaler tells it: where it is not 0, the next step changes nothing

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._adjust = {"match_rms_adamw": _as_adamw, "original": _by_sides}[adjust_lr]
        self.found_inf = torch.zeros(())
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim < 2:
                    raise ValueError(f"Muon updates matrices, not a parameter of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all weights that have a gradient. Every rank calls."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        gradient, weight = _local(parameter.grad), _local(parameter.detach())
        bad = self.found_inf.to(weight.device) != 0
        average = _local(self._moment(parameter))
        gradient = torch.where(bad, average, gradient)  # towards which the average does not move
        average.lerp_(gradient, 1 - group["momentum"])
        direction = _of_the_whole(orthogonal, gradient.lerp(average, group["momentum"]), parameter)
        weight.mul_(torch.where(bad, 1.0, 1 - group["lr"] * group["weight_decay"]))
        weight.add_(direction.masked_fill(bad, 0.0), alpha=-group["lr"] * self._adjust(*sides(parameter.shape)))

    def prepare_moments(self) -> None:
        """Zeros, for a checkpoint's to be put there."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._moment(parameter)

    def _moment(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(parameter)
        return state[MOMENTUM]


def sides(shape: Sequence[int]) -> tuple[int, int]:
    """Of the matrix that a weight is to Muon: outputs, and all that each is a sum of."""
    return shape[0], math.prod(shape[1:])


def orthogonal(matrix: Float[Tensor, "a b"]) -> Float[Tensor, "a b"]:
    """Roughly U V^T of matrix = U S V^T: five steps of a Newton-Schulz iteration, which bring singular values to between 0.7
    and 1.2, but for those that are far below the largest. In bf16 as torch's; on a CPU in fp32, where long matrices, as
    convolutions are, are multiplied once by what the iteration comes to."""
    a, b, c = _QUINTIC
    x = matrix.to(precision_on(matrix.device.type))
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / x.norm().clamp_min(_SMALLEST)
    if x.dtype == torch.float32 and x.shape[1] >= _LONG * x.shape[0]:
        x = _iterated(x @ x.mT) @ x
        return x.mT if tall else x
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _iterated(gram: Float[Tensor, "a a"]) -> Float[Tensor, "a a"]:
    """What the iteration multiplies a matrix of this Gram matrix by: each step by P = a I + b G + c G^2, after which G is
    P G P. Small singular values are squared here, for which bf16 has no room."""
    a, b, c = _QUINTIC
    product = None
    for step in range(_STEPS):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor if product is None else factor @ product
        if step < _STEPS - 1:
            gram = factor @ gram @ factor
    assert product is not None
    return product


def _of_the_whole(function: Callable[[Tensor], Tensor], part: Tensor, like: Tensor) -> Tensor:
    """The rows that this rank holds of `function` of the matrix of which `part` are its rows; computed where the ranks meet,
    also for weights that wait in host memory. `part` and the answer have the shape of the weight's own rows."""
    rows = part.flatten(1)
    if not isinstance(like, DTensor):
        return function(rows).view_as(part)
    mesh, cut = like.device_mesh, like.placements
    there = rows.to(mesh.device_type, precision_on(mesh.device_type))
    shape = torch.Size(sides(like.shape))
    whole = DTensor.from_local(there, mesh, cut, run_check=False, shape=shape, stride=(shape[1], 1)).full_tensor()
    found = DTensor.from_local(function(whole).contiguous(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return found.redistribute(placements=cut).to_local().to(part.device).view_as(part)


def precision_on(device: str) -> torch.dtype:
    return _ON_CPU if device == "cpu" else _PRECISION


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _as_adamw(rows: int, columns: int) -> float:
    return 0.2 * math.sqrt(max(rows, columns))


def _by_sides(rows: int, columns: int) -> float:
    return math.sqrt(max(1, rows / columns))
