"""SIGReg: how far the embeddings of the global batch are from an isotropic Gaussian (LeJEPA, arXiv 2511.08544,
section 4). Owns the statistic and its directions; refuses to keep a step counter or to read the device."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lejepa_scale.distributed import Group, sum_replicated
from lejepa_scale.objective.characteristic import fused_sums, reference_sums


class SIGReg(nn.Module):
    r"""Mean over views and random directions of the Epps-Pulley statistic of the projected embeddings.

    With p = z A for unit directions A, over the N samples of the *global* batch (all ranks of `group`):

        C_k = mean_n cos(t_k p_n),  S_k = mean_n sin(t_k p_n),  phi_k = exp(-t_k^2 / 2)
        T   = N sum_k w_k [ (C_k - phi_k)^2 + S_k^2 ]                                     estimator="v"
        T_U = N sum_k w_k [ (C_k - phi_k)^2 + S_k^2 - (1 - C_k^2 - S_k^2) / (N - 1) ]     estimator="u"

    where t_k is equally spaced on [0, t_max] and w_k are trapezoid weights of the whole line times phi_k. T_U has mean
    zero at N(0, I) for every N >= 2 and may be negative.

    `scale` is the factor in front: "n" (the paper), "reference" (`reference_n`, so that lambda keeps its meaning when the
    global batch changes) or "none" (1).

    The value is the same on every rank. After `backward`, `z.grad` holds W times the gradient of that value, W being the
    ranks of `group`, which is what an engine that averages gradients over ranks needs. One all-reduce of
    2 V M (knots - 1) + 1 numbers forward, none backward; unequal numbers of samples per rank are right.
    """

    def __init__(
        self,
        num_slices: int = 1024,
        knots: int = 17,
        t_max: float = 3.0,
        estimator: Literal["v", "u"] = "v",
        scale: Literal["n", "reference", "none"] = "n",
        backend: Literal["auto", "reference", "fused"] = "auto",
        group: Group = None,
        reference_n: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if num_slices < 1 or knots < 2 or t_max <= 0:
            raise ValueError(
                f"SIGReg needs num_slices >= 1, knots >= 2 and t_max > 0; got {num_slices}, {knots}, {t_max}."
            )
        for name, value, allowed in (
            ("estimator", estimator, ("v", "u")),
            ("scale", scale, ("n", "reference", "none")),
            ("backend", backend, ("auto", "reference", "fused")),
        ):
            if value not in allowed:
                raise ValueError(f"SIGReg {name} must be one of {', '.join(allowed)}; got {value!r}.")
        self.num_slices, self.knots, self.dt = num_slices, knots, t_max / (knots - 1)
        self.estimator, self.scale, self.reference_n = estimator, scale, reference_n
        self.group, self.seed = group, seed
        self._sums = reference_sums if backend == "reference" else fused_sums

    def directions(self, step: int, width: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "d m"]:
        """Unit columns drawn from (seed, step) alone: the same on every rank, others at the next step, no hidden state."""
        generator = torch.Generator(device).manual_seed(_mix(self.seed, step))
        a = torch.randn(width, self.num_slices, generator=generator, device=device, dtype=dtype)
        return a / a.norm(dim=0, keepdim=True).clamp_min(torch.finfo(dtype).tiny)

    def local_sums(self, z: Float[Tensor, "v n d"], step: int) -> Float[Tensor, "2 k v m"]:
        """Cosine and sine sums over this rank's samples, in fp32 (fp64 for fp64 embeddings)."""
        z = z if z.dtype == torch.float64 else z.float()
        a = self.directions(step, z.shape[-1], z.device, z.dtype)
        with torch.autocast(z.device.type, enabled=False):
            return self._sums(z @ a, self.dt, self.knots)

    def statistic(self, sums: Float[Tensor, "2 k v m"], count: Tensor) -> Float[Tensor, ""]:
        """The scaled statistic from sums over `count` samples in all."""
        cos, sin = sums / count
        t = self.dt * torch.arange(1, self.knots, device=sums.device, dtype=sums.dtype)
        phi = torch.exp(-0.5 * t**2)
        trapezoid = torch.full_like(t, 2 * self.dt)  # both halves of the line
        trapezoid[-1] = self.dt
        phi, weight = phi[:, None, None], (trapezoid * phi)[:, None, None]
        error = (cos - phi) ** 2 + sin**2  # [K-1, V, M]
        if self.estimator == "u":
            error = error - (1 - cos**2 - sin**2) / (count - 1)
        factor = {"n": count, "reference": self.reference_n, "none": 1.0}[self.scale]
        return factor * (weight * error).sum(0).mean()

    def forward(self, z: Float[Tensor, "*v n d"], *, step: int) -> Float[Tensor, ""]:
        """z: this rank's embeddings, [V, N, D] or [N, D]. `step` selects the directions."""
        z = z if z.ndim == 3 else z.unsqueeze(0)
        sums = self.local_sums(z, step)
        total = sum_replicated(torch.cat([sums.flatten(), sums.new_tensor([z.shape[1]])]), self.group)
        return self.statistic(total[:-1].view_as(sums), total[-1])


def _mix(seed: int, step: int) -> int:
    """A 63-bit generator seed in which neighbouring (seed, step) pairs land far apart (splitmix64 finaliser)."""
    x = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (x ^ (x >> 31)) >> 1
