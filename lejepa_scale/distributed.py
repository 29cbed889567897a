"""Rendezvous, device, and the only direct collectives outside engine/ and checkpoint/. Refuses to know the model."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lejepa_scale.errors import UserError

T = TypeVar("T")
Group = dist.ProcessGroup | None


def launched_ranks() -> int:
    """World size that torchrun or the deepspeed launcher asked for; 1 under plain `python`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def start(timeout: timedelta) -> torch.device:
    """Join the process group (NCCL on CUDA, gloo on CPU) and return this rank's device.

    Reads the environment that torchrun and the deepspeed launcher both set; under plain `python` it makes a group of one.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        os.environ.setdefault("LOCAL_RANK", "0")
    return device


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size(group: Group = None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def rank(group: Group = None) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


def all_reduce_sum(x: Tensor, group: Group = None) -> Tensor:
    """Sum over ranks, no gradient."""
    x = x.detach().clone()
    if world_size(group) > 1:
        dist.all_reduce(x, group=group)
    return x


def all_gather(x: Tensor, group: Group = None) -> Tensor:
    """[...] on each rank -> [W, ...] on every rank, no gradient; the same shape everywhere."""
    ranks = world_size(group)
    if ranks == 1:
        return x.detach()[None]
    out = x.new_empty(ranks * x.numel())
    dist.all_gather(list(out.chunk(ranks)), x.detach().flatten(), group=group)
    return out.view(ranks, *x.shape)


class _SumReplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.world = world_size(group)
        return all_reduce_sum(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.world, None


def sum_replicated(x: Tensor, group: Group = None) -> Tensor:
    """Differentiable sum over ranks, for a quantity that every rank then uses *identically*.

    All ranks hold the same gradient of the same scalar, so the backward sum is a multiplication by the world size: no
    collective. Frameworks divide gradients by W afterwards, which leaves the gradient of the global scalar.
    """
    return _SumReplicated.apply(x, group) if world_size(group) > 1 else x


def on_rank_zero(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 alone and give its result to all. A UserError on rank 0 is raised on every rank."""
    if world_size() == 1:
        return work()
    message: list[Any] = [None, None]
    failure: BaseException | None = None
    if rank() == 0:
        try:
            message[0] = work()
        except Exception as error:
            failure = error
            message[1] = str(error) if isinstance(error, UserError) else f"rank 0 failed: {error!r}"
    dist.broadcast_object_list(message, src=0)
    if failure is not None:
        raise failure
    if message[1] is not None:
        raised = UserError(message[1])
        raised.everywhere = True
        raise raised
    return message[0]


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` holds anywhere; every rank gets the same answer (one tiny collective and a host sync)."""
    if world_size() == 1:
        return flag
    return bool(all_reduce_sum(torch.tensor(int(flag), device=device)).item())


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()
