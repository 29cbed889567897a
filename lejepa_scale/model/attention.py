"""Packed self-attention: many sequences of several lengths in one row of tokens, none attending to another.
Owns the backends and the probe that picks one; xformers is imported here alone, lazily."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lejepa_scale.errors import UserError


@dataclass(frozen=True)
class Packing:
    """How a row of tokens is cut: `groups` of (sequences, tokens per sequence), in order."""

    groups: tuple[tuple[int, int], ...]

    @property
    def lengths(self) -> list[int]:
        """Tokens of every sequence, in order."""
        return [length for count, length in self.groups for _ in range(count)]

    @property
    def sequences(self) -> int:
        """How many there are in the row."""
        return sum(count for count, _ in self.groups)

    @property
    def tokens(self) -> int:
        """How many there are in the row."""
        return sum(count * length for count, length in self.groups)

    @property
    def pairs(self) -> int:
        """(query, key) pairs of tokens that attention scores."""
        return sum(count * length**2 for count, length in self.groups)

    def split(self, tokens: Float[Tensor, " t *rest"]) -> list[Float[Tensor, "_b _l *rest"]]:
        """[T, ...] -> one [B_i, L_i, ...] per group (views, no copies)."""
        parts = tokens.split([count * length for count, length in self.groups])
        return [part.unflatten(0, group) for part, group in zip(parts, self.groups, strict=True)]

    def thinned(self, rate: float) -> Packing:
        """Without a share of the sequences of every group: max(1, round(n (1 - rate))) stay."""
        return Packing(tuple((max(1, round(n * (1 - rate))), length) for n, length in self.groups))


Heads = Float[Tensor, "t h d"]  # queries, keys, values or what attention makes of them, over a row of tokens
Offsets = Int[Tensor, " sequences_plus_one"]
AttentionFunction = Callable[[Heads, Heads, Heads, Packing, Offsets], Heads]


@lru_cache(maxsize=256)
def offsets(packing: Packing, device: torch.device) -> Offsets:
    """Where each sequence of the row begins, and where the last one ends; int32, kept on the device."""
    lengths = torch.tensor([0, *packing.lengths], dtype=torch.int32)
    return lengths.cumsum(0, dtype=torch.int32).to(device)


def sdpa(q: Heads, k: Heads, v: Heads, packing: Packing, starts: Offsets) -> Heads:
    """One dense scaled-dot-product attention per group; [T, H, D] in and out. Runs everywhere."""
    out = []
    for qi, ki, vi in zip(packing.split(q), packing.split(k), packing.split(v), strict=True):  # [B, L, H, D]
        attended = F.scaled_dot_product_attention(qi.transpose(1, 2), ki.transpose(1, 2), vi.transpose(1, 2))
        out.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(out)


@torch.compiler.disable
def xformers(q: Heads, k: Heads, v: Heads, packing: Packing, starts: Offsets) -> Heads:
    """xformers memory-efficient attention under a block-diagonal mask. CUDA only. [T, H, D] in and out. Raises
    UserError where the package is missing."""
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise UserError("model.attention=xformers needs xformers: pip install 'lejepa_scale[gpu]'.") from error
    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=_block_diagonal(packing, q.device))[0]


def varlen(q: Heads, k: Heads, v: Heads, packing: Packing, starts: Offsets) -> Heads:
    """torch's own variable-length flash attention (torch >= 2.10, fp16/bf16). CUDA only. [T, H, D] in and out.
    Raises UserError where torch is older."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise UserError(f"model.attention=varlen needs torch >= 2.10; this is {torch.__version__}.") from error
    longest = max(length for _, length in packing.groups)
    out = varlen_attn(q, k, v, starts, starts, longest, longest)
    return out if isinstance(out, Tensor) else out[0]


BACKENDS: dict[str, AttentionFunction] = {"varlen": varlen, "xformers": xformers, "sdpa": sdpa}


@lru_cache(maxsize=256)
def _block_diagonal(packing: Packing, device: torch.device) -> Any:
    from xformers.ops.fmha import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens(packing.lengths, device=device)


@lru_cache(maxsize=64)
def choose_backend(
    name: str,
    packing: Packing,
    *,
    heads: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    traced: bool = False,
) -> str:
    """The fastest backend for `auto`: those whose forward and backward run here and agree with sdpa are timed on tokens
    laid out like `packing`; xformers only where varlen, whose kernel it shares, cannot run, and not where blocks are
    compiled (`traced`), which it breaks apart. A backend asked for by name is tried too. Raises UserError, with the
    reasons, where none can run.

    The choice is kept for the process. Draws from a generator of its own.
    """
    if device.type == "meta":  # shapes only
        return "sdpa"
    reasons, usable = list[str](), list[str]()
    for candidate in BACKENDS if name == "auto" else [name]:
        if name == "auto" and candidate == "xformers" and (traced or "varlen" in usable):
            continue
        reason = _fault(candidate, packing, heads, head_dim, device, dtype)
        if reason is None:
            usable.append(candidate)
        reasons.append(f"{candidate}: {reason}")
    if not usable:
        raise UserError(
            f"model.attention={name} cannot run on {device.type} in {str(dtype).removeprefix('torch.')} with head width "
            f"{head_dim} ({'; '.join(reasons)}). Use model.attention=auto."
        )
    if len(usable) == 1:
        return usable[0]
    times = {backend: _seconds(backend, packing, heads, head_dim, device, dtype) for backend in usable}
    return min(times, key=times.__getitem__)


def _fault(
    name: str, packing: Packing, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> str | None:
    """None if the backend works on two sequences of every length, else why not."""
    if name == "sdpa":
        return None
    if device.type != "cuda":
        return "needs CUDA"
    few = Packing(tuple((min(count, 2), length) for count, length in packing.groups))
    inputs = _draw(few, heads, head_dim, device, dtype)
    results = []
    for backend in (name, "sdpa"):
        try:
            results.append(_forward_backward(backend, inputs, few))
        except Exception as error:  # an unsupported kernel may raise anything
            said = str(error).strip().split("\n")  # what was tried first, and at the end why it cannot be
            return " ... ".join(dict.fromkeys(x.strip()[:120] for x in (said[0], said[-1]))) or type(error).__name__
    for ours, oracle in zip(*results, strict=True):
        distance = float((ours - oracle).float().norm() / oracle.float().norm())
        if not distance < 3e-2:
            return f"differs from sdpa by {distance:.1e}"
    return None


def _seconds(name: str, packing: Packing, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> float:
    """Median time of a forward and backward pass, the first of which only warms up."""
    inputs = _draw(packing, heads, head_dim, device, dtype)
    times = []
    for _ in range(6):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        _forward_backward(name, inputs, packing)
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return median(times[1:])


def _draw(
    packing: Packing, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "4 {packing.tokens} {heads} {head_dim}"]:
    """Queries, keys, values and an output's gradient."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(4, packing.tokens, heads, head_dim, generator=generator, device=device, dtype=dtype)


def _forward_backward(
    name: str, inputs: Float[Tensor, "4 t h d"], packing: Packing
) -> Sequence[Float[Tensor, "t h d"]]:
    """Output and the gradients of queries, keys and values."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(inputs.device.type, enabled=False):
        q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
        out = BACKENDS[name](q, k, v, packing, offsets(packing, inputs.device))
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3])]
