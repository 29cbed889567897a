"""Collectives and engines in a process group of one: NCCL on CUDA, gloo on a CPU. What it shows is that they run and give
what they should, not what they cost between machines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from benchmarks.measure import Row, milliseconds
from benchmarks.rates import free
from benchmarks.trial import Recipe, Trial
from lejepa_scale.parallel import process_group

_TOLERANCE = 2e-2  # of losses in bf16, as in compare.py

# Each leaves in `out` what it makes of x.
COLLECTIVES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "all_reduce": lambda out, x: dist.all_reduce(out.copy_(x)),
    "all_gather_into_tensor": dist.all_gather_into_tensor,
    "reduce_scatter_tensor": dist.reduce_scatter_tensor,
    "broadcast": lambda out, x: dist.broadcast(out.copy_(x), src=0),
}


def collective(name: str, elements: int, repeats: int, device: torch.device, _: Sequence[Row]) -> Iterator[Row]:
    """In a group of one each of them gives what it was given, in fp32 and bf16."""
    _join()
    call = COLLECTIVES[name]
    x = torch.randn(elements, device=device, generator=torch.Generator(device).manual_seed(0))
    right = True
    for dtype in (torch.float32, torch.bfloat16):
        given, out = x.to(dtype), torch.full((elements,), torch.nan, dtype=dtype, device=device)
        call(out, given)
        right &= bool(torch.equal(out, given))
    out = torch.empty_like(x)
    ms = milliseconds(lambda: call(out, x), device, repeats)
    yield {"case": name, "ok": right, "backend": _backend(device), "MB": 4 * elements / 1e6, "ms": ms}


def engine(name: str, recipe: Recipe, device: torch.device, _: Sequence[Row]) -> Iterator[Row]:
    """First steps of an engine, against those of `single` on the same views."""
    if name.startswith("zero") and find_spec("deepspeed") is None:
        yield {"case": name, "cannot run": "DeepSpeed is not installed"}
        return
    _join()
    losses = {}
    for kind in ("single", name):
        trial = Trial(recipe.config(f"engine.name={kind}"), device, shared=True)
        losses[kind] = [loss for loss, _ in trial.first]
        trial.engine.close()
        del trial
        free(device)
    differ = [abs(a / b - 1) for a, b in zip(losses[name], losses["single"], strict=True)]
    yield {
        "case": f"{name}, {recipe.config().model.encoder}",
        "ok": max(differ) < _TOLERANCE,
        "backend": _backend(device),
        "loss": losses[name][0],
        "of single": losses["single"][0],
        "differs by": differ[0],
        "losses of all steps differ by": max(differ),
    }


def _join() -> None:
    if not dist.is_initialized():
        process_group.join(timedelta(minutes=1))


def _backend(device: torch.device) -> str:
    """Of the group, for tensors of the device."""
    return str(distributed_c10d._get_default_group()._get_backend(device).name())
