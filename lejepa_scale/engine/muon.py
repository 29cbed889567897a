"""Muon (K. Jordan and others, 2024; arXiv 2502.16982), as torch.optim.Muon computes it, also for convolutions, for matrices
that FSDP has cut, and with a step that can be left out without the host's knowing. Weights are its caller's choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement

from lejepa_scale.engine.base import MOMENTUM
from lejepa_scale.parallel.collectives import all_gather, exchange
from lejepa_scale.parallel.process_group import Group, rank, world_size

_STEPS, _QUINTIC = 5, (3.4445, -4.7750, 2.0315)  # K. Jordan's: a x + b x^3 + c x^5 on every singular value
_SMALLEST = 1e-7  # norm that is divided by
# Of the iteration: CPUs without bf16 products would take 16 times as long in it.
_PRECISION, _ON_CPU = torch.bfloat16, torch.float32
_LONG = 3  # columns for each row, from which it is cheaper to iterate on the Gram matrix, in fp32


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonal factor of each matrix's Nesterov momentum; of a convolution's [out, in, height, width] as
    the matrix [out, in height width]. The ranks that FSDP has cut a matrix over share the matrices out: each makes the
    factors of some, whole, of the rows that all send it in the iteration's own precision. The numbers are those of one
    process.

    copies: all ranks of the default group hold whole matrices and the same gradients, and share the matrices out too.
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
        copies: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._adjust = {"match_rms_adamw": _as_adamw, "original": _by_sides}[adjust_lr]
        self.found_inf = torch.zeros(())
        self._copies = _Copies() if copies else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim < 2:
                    raise ValueError(f"Muon updates matrices, not a parameter of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all weights that have a gradient. Every rank calls."""
        assert closure is None
        found = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        ranks = (_Cut.of(found[0][0]) if found else None) or self._copies  # as all are: an engine has one mesh
        for together in rounds([p.shape for p, _ in found], ranks.count if ranks else 1):
            self._update([found[index] for index in together], ranks)

    def _update(self, together: list[tuple[nn.Parameter, dict[str, Any]]], ranks: _Cut | _Copies | None) -> None:
        ahead = [self._ahead(parameter, group) for parameter, group in together]
        if ranks is None:
            directions = [orthogonal(rows.flatten(1)).view_as(rows) for rows in ahead]
        else:
            directions = ranks.orthogonal(ahead, [sides(parameter.shape) for parameter, _ in together])
        for (parameter, group), direction in zip(together, directions, strict=True):
            self._move(parameter, group, direction)

    def _ahead(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """This rank's rows of Nesterov's momentum."""
        gradient, average = _local(parameter.grad), _local(self._moment(parameter))
        bad = self.found_inf.to(gradient.device) != 0
        gradient = torch.where(bad, average, gradient)  # towards which the average does not move
        average.lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(average, group["momentum"])

    def _move(self, parameter: nn.Parameter, group: dict[str, Any], direction: Tensor) -> None:
        weight = _local(parameter.detach())
        bad = self.found_inf.to(weight.device) != 0
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


@dataclass(frozen=True)
class _Cut:
    """How FSDP has cut matrices: by rows, over the ranks of a group, which meet on a device."""

    group: Group
    device: torch.device

    @classmethod
    def of(cls, parameter: Tensor) -> _Cut | None:
        """None for one that is whole."""
        if not isinstance(parameter, DTensor):
            return None
        mesh = parameter.device_mesh
        axis = next(i for i, placement in enumerate(parameter.placements) if isinstance(placement, ShardPlacement))
        return cls(mesh.get_group(axis), torch.device(mesh.device_type))

    @property
    def count(self) -> int:
        return world_size(self.group)

    def orthogonal(self, parts: Sequence[Tensor], shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """This rank's rows of the orthogonal factors of matrices of these sides, of which `parts` are its rows, maybe in
        host memory: rank i makes the i-th."""
        precision, sent = precision_on(self.device.type), [part.numel() for part in parts]
        sent += [0] * (self.count - len(parts))
        mine = rank(self.group) if rank(self.group) < len(shapes) else None
        received = [0] * self.count if mine is None else _elements(shapes[mine], self.count)
        rows = (part.flatten().to(self.device, precision) for part in parts)
        whole = exchange(torch.cat(list(rows)), sent, received, self.group)
        if mine is not None:
            whole = orthogonal(whole.view(shapes[mine])).flatten()
        found = exchange(whole, received, sent, self.group).split(sent)
        return [x.to(part.device).view_as(part) for x, part in zip(found, parts, strict=False)]


class _Copies:
    """Every rank of the default group holds whole matrices."""

    @property
    def count(self) -> int:
        return world_size()

    def orthogonal(self, whole: Sequence[Tensor], shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """The orthogonal factors of matrices of these sides: rank i makes the i-th, and all get it."""
        longest = max(matrix.numel() for matrix in whole)
        mine = whole[0].new_zeros(longest, dtype=precision_on(whole[0].device.type))
        if rank() < len(whole):
            made = orthogonal(whole[rank()].view(shapes[rank()])).flatten()
            mine[: made.numel()] = made
        found = zip(all_gather(mine), whole, strict=False)
        return [row[: matrix.numel()].view_as(matrix) for row, matrix in found]


def _elements(shape: tuple[int, int], ranks: int) -> list[int]:
    """Of each rank's rows: as many on each as fill the first ones."""
    rows, columns = shape
    of_a_rank = -(-rows // ranks)
    return [columns * max(0, min(of_a_rank, rows - first)) for first in range(0, of_a_rank * ranks, of_a_rank)]


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


def rounds(shapes: Sequence[Sequence[int]], ranks: int) -> list[list[int]]:
    """The matrices, by number, that are made at a time: one on each rank, and for all ranks about as much to do."""
    order = sorted(range(len(shapes)), key=lambda index: iteration_flops(shapes[index]), reverse=True)
    return [order[first : first + ranks] for first in range(0, len(order), ranks)]


def iteration_flops(shape: Sequence[int]) -> int:
    """Of the iteration, as it is on a GPU: in each step the Gram matrix, its square, and their product with the matrix."""
    short, long = sorted(sides(shape))
    return _STEPS * (2 * short * short * long + 2 * short**3 + 2 * short * short * long)


def precision_on(device: str) -> torch.dtype:
    return _ON_CPU if device == "cpu" else _PRECISION


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _as_adamw(rows: int, columns: int) -> float:
    return 0.2 * math.sqrt(max(rows, columns))


def _by_sides(rows: int, columns: int) -> float:
    return math.sqrt(max(1, rows / columns))
