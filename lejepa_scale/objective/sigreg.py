"""SIGReg: how far the embeddings of the global batch are from an isotropic Gaussian (LeJEPA, arXiv 2511.08544,
section 4). Owns the statistic and its directions; refuses to keep a step counter or to read the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from lejepa_scale import seeds
from lejepa_scale.objective import characteristic, cpu_kernels
from lejepa_scale.objective.comm_cost import MODES, Mode, Traffic, traffic
from lejepa_scale.objective.regularizer import Regularizer
from lejepa_scale.parallel.collectives import counts_of_ranks, gather_rows, sum_replicated
from lejepa_scale.parallel.process_group import Group, rank, world_size

Backend = Literal["auto", "reference", "fused", "native", "triton"]


class SIGReg(Regularizer):
    r"""Mean over views and random directions of the Epps-Pulley statistic of the projected embeddings.

    With p = z a^T for unit directions a, over the N samples of the *global* batch (all ranks of `group`):

        C_k = mean_n cos(t_k p_n),  S_k = mean_n sin(t_k p_n),  phi_k = exp(-t_k^2 / 2)
        T   = N sum_k w_k [ (C_k - phi_k)^2 + S_k^2 ]                                     estimator="v"
        T_U = N sum_k w_k [ (C_k - phi_k)^2 + S_k^2 - (1 - C_k^2 - S_k^2) / (N - 1) ]     estimator="u"

    where t_k is equally spaced on [0, t_max] and w_k are trapezoid weights of the whole line times phi_k (any number of
    knots from 2 will do). E[T] = N sum_k w_k |phi_P - phi_k|^2 + sum_k w_k (1 - |phi_P|^2) (Theorem 6): the second term is
    a bias that T_U removes. T_U has mean zero at N(0, I) for every N >= 2 and may be negative.

    scale: the factor in front: "n" (the paper), "reference" (`reference_n`, so that lambda keeps its meaning when the global
    batch changes) or "none" (1). joint: see Regularizer; N is then V N.

    communication: how ranks meet; the value is the same (comm_cost.Traffic has the costs).
    - "sums": one all-reduce of 2 V M (knots - 1) + 1 numbers forward, none backward.
    - "embeddings": gather, and every rank does all the arithmetic. No collective backward.
    - "distinct": gather, and each rank takes its share of the M directions. A reduce-scatter backward.
    - "auto": the cheapest for the `counts` that the call is given; "sums" without them. The explicit gathers exchange
      missing counts between hosts.

    backend: "reference" (textbook), "fused" (eager, blocked), "native" (C++, CPU), "triton" (CUDA), or "auto": triton on
    CUDA; native on a CPU with a C++ compiler, else fused. Embeddings that are not finite give NaN, never a wrong number.

    tf32: on CUDA, with fused and triton, what is multiplied to project fp32 embeddings is rounded to TF32 (10 bits of
    mantissa): by less than 1e-4 another statistic (docs/benchmarks.md), on tensor cores.

    Raises ValueError for settings or embeddings that have no such statistic.
    """

    def __init__(
        self,
        num_slices: int = 1024,
        knots: int = 17,
        t_max: float = 3.0,
        estimator: Literal["v", "u"] = "v",
        scale: Literal["n", "reference", "none"] = "n",
        backend: Backend = "auto",
        group: Group = None,
        *,
        reference_n: int = 256,
        joint: bool = False,
        tf32: bool = False,
        communication: Literal["auto"] | Mode = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__(joint=joint, group=group, seed=seed, least=2 if estimator == "u" else 1)
        if num_slices < 1 or knots < 2 or not t_max > 0 or reference_n < 1:
            raise ValueError(
                "SIGReg needs num_slices >= 1, knots >= 2, t_max > 0 and reference_n >= 1; got "
                f"{num_slices}, {knots}, {t_max} and {reference_n}."
            )
        for name, value, allowed in (
            ("estimator", estimator, ("v", "u")),
            ("scale", scale, ("n", "reference", "none")),
            ("backend", backend, get_args(Backend)),
            ("communication", communication, ("auto", *MODES)),
        ):
            if value not in allowed:
                raise ValueError(f"SIGReg {name} must be one of {', '.join(allowed)}; got {value!r}.")
        self.num_slices, self.knots, self.dt = num_slices, knots, t_max / (knots - 1)
        self.estimator, self.scale, self.reference_n = estimator, scale, reference_n
        self.backend, self.communication, self.tf32 = backend, communication, tf32

    def directions(
        self, step: int, width: int, device: torch.device, dtype: torch.dtype
    ) -> Float[Tensor, "{self.num_slices} {width}"]:
        """Unit rows drawn from (seed, step) alone: the same on every rank, others at the next step, no hidden state."""
        return unit_rows(self.seed, step, self.num_slices, width, device, dtype)

    def traffic(self, views: int, counts: Sequence[int], width: int, itemsize: int = 4) -> Traffic:
        """What each way of communication costs for embeddings [views, counts[r], width] on rank r."""
        if self.joint:
            views, counts = 1, [views * count for count in counts]
        return traffic(views, counts, width, slices=self.num_slices, knots=self.knots, itemsize=itemsize)

    def mode(self, views: int, counts: Sequence[int] | None, width: int, itemsize: int = 4) -> Mode:
        """The communication of a call; the same answer on every rank."""
        if self.communication != "auto":
            return self.communication
        if counts is None or len(counts) == 1:
            return "sums"
        return self.traffic(views, counts, width, itemsize).cheapest

    def reduced(
        self, z: Float[Tensor, "v n d"], extra: Float[Tensor, " e"], *, step: int, counts: Sequence[int] | None = None
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " e"]]:
        views, count, width = z.shape
        world = world_size(self.group)
        mode = self.mode(views, counts, width, z.element_size())
        if mode == "sums" or world == 1:
            return super().reduced(z, extra, step=step, counts=counts)
        counts = counts_of_ranks(count, self.group) if counts is None else counts
        self._refuse_too_few(z, counts)
        z = self._sample(z)
        if self.joint:
            counts = [views * n for n in counts]
        with torch.autocast(z.device.type, enabled=False):
            rows = gather_rows(z, counts, same_use=mode == "embeddings", group=self.group)
            a = self.directions(step, width, z.device, rows.dtype)
            if mode == "distinct":
                a = a.tensor_split(world)[rank(self.group)]
            part = self.statistic(self._sums(rows, a), rows.new_full((), sum(counts)), step)
            if mode == "embeddings":
                return part, sum_replicated(extra, self.group)
            packed = sum_replicated(torch.cat([part[None], extra.to(part.dtype)]), self.group)
            return packed[0], packed[1:]

    def local_sums(self, z: Float[Tensor, "v n d"], step: int) -> Float[Tensor, "2 {self.knots}-1 v {self.num_slices}"]:
        """Cosine and sine sums over this rank's samples."""
        return self._sums(z, self.directions(step, z.shape[-1], z.device, z.dtype))

    def _sums(self, z: Float[Tensor, "v n d"], a: Float[Tensor, "m d"]) -> Float[Tensor, "2 {self.knots}-1 v m"]:
        backend = self._backend(z)
        if backend == "reference":
            return characteristic.reference_sums(z, a, self.dt, self.knots)
        return characteristic.fused_sums(z, a, self.dt, self.knots, backend, self.tf32)

    def _backend(self, z: Tensor) -> Backend:
        if self.backend != "auto":
            return self.backend
        if torch.compiler.is_compiling():
            return "fused"
        if z.is_cuda:
            return "triton" if characteristic.has_triton() else "fused"
        return "native" if z.device.type == "cpu" and cpu_kernels.available() else "fused"

    def statistic(
        self, sums: Float[Tensor, "2 {self.knots}-1 v m"], count: Float[Tensor, ""], step: int
    ) -> Float[Tensor, ""]:
        """Of M' <= num_slices directions, their share of the mean over directions."""
        return self.of_each(sums, count).sum() / (sums.shape[2] * self.num_slices)

    def of_each(self, sums: Float[Tensor, "2 {self.knots}-1 v m"], count: Float[Tensor, ""]) -> Float[Tensor, "v m"]:
        """The scaled statistic of each view and direction."""
        cos, sin = sums / count
        t = self.dt * torch.arange(1, self.knots, device=sums.device, dtype=sums.dtype)
        phi = torch.exp(-0.5 * t**2)
        trapezoid = torch.full_like(t, 2 * self.dt)  # both halves of the line
        trapezoid[-1:].fill_(self.dt)  # an assignment to one element would be a copy from the host
        phi, weight = phi[:, None, None], (trapezoid * phi)[:, None, None]
        error = (cos - phi) ** 2 + sin**2  # [K-1, V, M']
        if self.estimator == "u":
            error = error - (1 - cos**2 - sin**2) / (count - 1)
        factor = {"n": count, "reference": self.reference_n, "none": 1.0}[self.scale]
        return factor * (weight * error).sum(0)


def unit_rows(
    seed: int, step: int, rows: int, columns: int, device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "{rows} {columns}"]:
    """Rows uniform on the unit sphere, from (seed, step) alone."""
    a = normal(seed, step, rows, columns, device, dtype)
    return a / a.norm(dim=1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)


def normal(
    seed: int, step: int, rows: int, columns: int, device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "{rows} {columns}"]:
    """Standard normal [rows, columns] from (seed, step) alone."""
    # Under torch.compile as an opaque operator, lest the graph breaks; the first call of one imports a symbolic algebra
    # system, four seconds that an eager process need not spend.
    draw = _opaque_draw if torch.compiler.is_compiling() else _draw
    return draw(seed, step, rows, columns, device, dtype)


def _draw(seed: int, step: int, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(device).manual_seed(seeds.of_directions(seed, step))
    return torch.randn(rows, columns, generator=generator, device=device, dtype=dtype)


_opaque_draw = torch.library.custom_op(
    "lejepa_scale::normal",
    _draw,
    mutates_args=(),
    schema="(SymInt seed, SymInt step, SymInt rows, SymInt columns, Device device, ScalarType dtype) -> Tensor",
)


@_opaque_draw.register_fake
def _(seed: int, step: int, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows, columns, device=device, dtype=dtype)


def best_scale(samples: int, knots: int = 17, t_max: float = 3.0) -> float:
    """The standard deviation s at which `samples` embeddings from N(0, s^2 I) have the least mean V-statistic, to 0.01.

    At a knot t its mean is (1 - exp(-s^2 t^2)) / N + (exp(-s^2 t^2 / 2) - exp(-t^2 / 2))^2: a variance that is least at
    s = 0, and a squared bias that is least at s = 1. 1 for N without end, where the first is gone; 0 for N = 1.
    """
    t = torch.linspace(0, t_max, knots, dtype=torch.float64)
    s = torch.arange(0, 1.01, 0.01, dtype=torch.float64)[:, None]
    variance = (1 - torch.exp(-((s * t) ** 2))) / samples
    bias = torch.exp(-((s * t) ** 2) / 2) - torch.exp(-(t**2) / 2)
    weighted = (variance + bias**2) * torch.exp(-(t**2) / 2)
    return float(s[torch.trapezoid(weighted, t).argmin()])
