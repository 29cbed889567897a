"""Packed self-attention: many sequences of several lengths in one row of tokens, none attending to another.
Owns the backends and the probe that picks one; xformers is imported here alone, lazily."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lejepa_scale.errors import UserError


@dataclass(frozen=True)
class Packing:
    """How a row of tokens is cut: `groups` of (sequences, tokens per sequence), in order."""

    groups: tuple[tuple[int, int], ...]

    @property
    def lengths(self) -> list[int]:
        return [length for count, length in self.groups for _ in range(count)]

    def split(self, tokens: Float[Tensor, " t *rest"]) -> list[Tensor]:
        """[T, ...] -> one [B_i, L_i, ...] per group (views, no copies)."""
        parts = tokens.split([count * length for count, length in self.groups])
        return [part.unflatten(0, group) for part, group in zip(parts, self.groups, strict=True)]

    def expand(self, per_sequence: Float[Tensor, " s"]) -> Float[Tensor, "t 1"]:
        """One value per sequence -> one per token."""
        counts = [count for count, _ in self.groups]
        parts = per_sequence.split(counts)
        lengths = [length for _, length in self.groups]
        return torch.cat([p.repeat_interleave(n) for p, n in zip(parts, lengths, strict=True)]).unsqueeze(-1)


AttentionFunction = Callable[[Tensor, Tensor, Tensor, Packing], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """One dense scaled-dot-product attention per group; [T, H, D] in and out. Runs everywhere."""
    out = []
    for qi, ki, vi in zip(packing.split(q), packing.split(k), packing.split(v), strict=True):  # [B, L, H, D]
        attended = F.scaled_dot_product_attention(qi.transpose(1, 2), ki.transpose(1, 2), vi.transpose(1, 2))
        out.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(out)


def xformers(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """xformers memory-efficient attention under a block-diagonal mask. CUDA only."""
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise UserError("model.attention=xformers needs the package: pip install xformers.") from error
    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=_block_diagonal(packing, q.device))[0]


def varlen(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """torch's own variable-length flash attention (torch >= 2.10, fp16/bf16). CUDA only."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise UserError(f"model.attention=varlen needs torch >= 2.10; this is {torch.__version__}.") from error
    offsets, longest = _offsets(packing, q.device)
    out = varlen_attn(q, k, v, offsets, offsets, longest, longest)
    return out if isinstance(out, Tensor) else out[0]


BACKENDS: dict[str, AttentionFunction] = {"xformers": xformers, "varlen": varlen, "sdpa": sdpa}


@lru_cache(maxsize=16)
def _block_diagonal(packing: Packing, device: torch.device) -> Any:
    from xformers.ops.fmha import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens(packing.lengths, device=device)


@lru_cache(maxsize=16)
def _offsets(packing: Packing, device: torch.device) -> tuple[Tensor, int]:
    lengths = torch.tensor([0, *packing.lengths], dtype=torch.int32)
    return lengths.cumsum(0, dtype=torch.int32).to(device), int(lengths.max())


def attend(q: Tensor, k: Tensor, v: Tensor, packing: Packing, backend: str) -> Tensor:
    """Self-attention within each sequence of a packed row: [T, H, D] each -> [T, H, D]."""
    name = choose_backend(backend, heads=q.shape[1], head_dim=q.shape[2], device=q.device, dtype=q.dtype)
    return BACKENDS[name](q, k, v, packing)


def choose_backend(name: str, *, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> str:
    """Resolve `auto` to the first backend whose forward and backward run here and agree with sdpa.

    A backend asked for by name is probed too, and refused with the reason if it cannot run.
    """
    if device.type == "meta":  # shapes only
        return "sdpa"
    candidates = list(BACKENDS) if name == "auto" else [name]
    reasons = []
    for candidate in candidates:
        reason = _probe(candidate, heads, head_dim, device, dtype)
        if reason is None:
            return candidate
        reasons.append(f"{candidate}: {reason}")
    raise UserError(
        f"model.attention={name} cannot run on {device.type} in {str(dtype).removeprefix('torch.')} with head width "
        f"{head_dim} ({'; '.join(reasons)}). Use model.attention=auto."
    )


@lru_cache(maxsize=32)
def _probe(name: str, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """None if the backend works, else why not."""
    if name == "sdpa":
        return None
    if device.type != "cuda":
        return "needs CUDA"
    packing = Packing(((2, 17), (3, 5)))
    q, k, v = torch.randn(3, 49, heads, head_dim, device=device, dtype=dtype)
    results = []
    for backend in (BACKENDS[name], sdpa):
        inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        try:
            out = backend(inputs[0], inputs[1], inputs[2], packing)
            out.square().sum().backward()
        except Exception as error:  # an unsupported kernel may raise anything
            return str(error).split("\n")[0][:120] or type(error).__name__
        results.append([out.detach(), *(x.grad for x in inputs)])
    for ours, oracle in zip(*results, strict=True):
        distance = float((ours - oracle).float().norm() / oracle.float().norm())
        if not distance < 3e-2:
            return f"differs from sdpa by {distance:.1e}"
    return None
