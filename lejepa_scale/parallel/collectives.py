"""Collectives with and without gradients, over ranks that may hold unequal numbers of samples. Refuses to know the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lejepa_scale.errors import Exit, UserError
from lejepa_scale.parallel import process_group, shared_memory, waiting
from lejepa_scale.parallel.process_group import Group, rank, world_size
from lejepa_scale.parallel.shared_memory import SharedMemory

T = TypeVar("T")


def all_reduce_sum(x: Shaped[Tensor, "*shape"], group: Group = None) -> Shaped[Tensor, "*shape"]:
    """Sum over ranks, no gradient."""
    if (memory := _shared_by(x, group)) is not None:
        return memory.sum(x)
    x = x.detach().clone()
    if world_size(group) > 1:
        dist.all_reduce(x, group=group)
    return x


def begin_sum(x: Shaped[Tensor, "*shape"]) -> Callable[[], Shaped[Tensor, "*shape"]]:
    """`all_reduce_sum` over all ranks of a CPU tensor, begun: what is returned gives the sum, and waits where it is not
    there yet. Every rank begins, and ends what it has begun before the group is left (on errors it need not)."""
    x = x.detach().clone()
    if world_size() == 1:
        return lambda: x
    work = dist.all_reduce(x, async_op=True)

    def end() -> Tensor:
        assert work is not None
        work.wait()
        return x

    return end


def begin_gather(x: Shaped[Tensor, " n"]) -> Callable[[], Shaped[Tensor, " ranks n"]]:
    """`all_gather` over all ranks of a CPU tensor, begun: what is returned gives a row per rank, and waits where they are
    not there yet. Every rank begins, and ends what it has begun before the group is left (on errors it need not)."""
    x = x.detach().clone()
    if world_size() == 1:
        return lambda: x[None]
    out = x.new_empty(world_size() * x.numel())
    work = _gather_into(out, x, async_op=True)

    def end() -> Tensor:
        assert work is not None
        work.wait()
        return out.view(world_size(), -1)

    return end


def mean_of_rows(x: Float[Tensor, "v n d"], group: Group = None) -> Float[Tensor, "v 1 d"]:
    """Mean over the rows of all ranks, which may hold unequal numbers of them; no gradient."""
    sums = all_reduce_sum(torch.cat([x.detach().sum(1).flatten(), x.new_full((1,), x.shape[1])]), group)
    return (sums[:-1] / sums[-1]).view(len(x), 1, x.shape[2])


def all_gather(x: Shaped[Tensor, "*shape"], group: Group = None) -> Shaped[Tensor, " ranks *shape"]:
    """[...] on each rank -> [W, ...] on every rank, no gradient; the same shape everywhere."""
    ranks = world_size(group)
    if ranks == 1:
        return x.detach()[None]
    if (memory := _shared_by(x, group)) is not None:
        return memory.gather(x)
    out = x.new_empty(ranks * x.numel())
    _gather_into(out, x.detach().flatten(), group=group)
    return out.view(ranks, *x.shape)


_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


_shared: tuple[Group, SharedMemory | None] = None, None  # the group it belongs to


def _shared_by(x: Tensor, group: Group) -> SharedMemory | None:
    """What all ranks can exchange x in, where they are CPU ranks of one host."""
    global _shared
    if x.device.type != "cpu" or not x.numel() or world_size() == 1 or group not in (None, dist.group.WORLD):
        return None
    if _shared[0] is not dist.group.WORLD:
        _shared = dist.group.WORLD, shared_memory.shared(process_group.timeout().total_seconds())
        process_group.before_leaving(_forget_shared)
    return _shared[1]


@contextmanager
def without_shared_memory() -> Iterator[None]:
    """Inside, all ranks meet in the group's own collectives: for ranks that are not there, and to see what would be sent."""
    global _shared
    before, _shared = _shared, (dist.group.WORLD, None)
    try:
        yield
    finally:
        _shared = before


def _forget_shared() -> None:
    global _shared
    _shared = None, None


class _SumReplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "*shape"], group: Group) -> Float[Tensor, "*shape"]:
        ctx.world = world_size(group)
        return all_reduce_sum(x, group)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: Float[Tensor, "*shape"]
    ) -> tuple[Float[Tensor, "*shape"], None]:
        return grad * ctx.world, None


def sum_replicated(x: Float[Tensor, "*shape"], group: Group = None) -> Float[Tensor, "*shape"]:
    """Differentiable sum over ranks, for a quantity that every rank then uses *identically*.

    All ranks hold the same gradient of the same scalar, so the backward sum is a multiplication by the world size: no
    collective. Frameworks divide gradients by W afterwards, which leaves the gradient of the global scalar.
    """
    return _SumReplicated.apply(x, group) if world_size(group) > 1 else x


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "v n d"], counts: Sequence[int], same_use: bool, group: Group
    ) -> Float[Tensor, "v total d"]:
        ctx.counts, ctx.same_use, ctx.group, ctx.dtype = counts, same_use, group, x.dtype
        parts = all_gather(_padded(x, max(counts)), group)  # [W, V, longest, D]
        rows = torch.cat([part[:, :count] for part, count in zip(parts, counts, strict=True)], 1)
        return rows if x.dtype == torch.float64 else rows.float()

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: Float[Tensor, "v total d"]
    ) -> tuple[Float[Tensor, "v n d"], None, None, None]:
        parts = grad.split(list(ctx.counts), 1)
        me, longest = rank(ctx.group), max(ctx.counts)
        if ctx.same_use:
            mine = parts[me] * len(parts)
        else:
            mine = grad.new_empty(len(grad), longest, grad.shape[2])
            dist.reduce_scatter(mine, [_padded(part, longest) for part in parts], group=ctx.group)
            mine = mine[:, : ctx.counts[me]]
        return mine.to(ctx.dtype), None, None, None


def _padded(x: Float[Tensor, "v n d"], rows: int) -> Float[Tensor, "v {rows} d"]:
    return torch.cat([x, x.new_zeros(len(x), rows - x.shape[1], x.shape[2])], 1)


def gather_rows(
    x: Float[Tensor, "v n d"], counts: Sequence[int], *, same_use: bool, group: Group = None
) -> Float[Tensor, "v total d"]:
    """Every rank's rows along dim 1 in rank order, sent as they are and returned in fp32 (fp64 for fp64); rank r has
    counts[r] of them. Differentiable; gradients are reduced in the precision of the result.

    Gradients follow `sum_replicated`: W times that of the global scalar. With `same_use` every rank goes on to the same
    scalar from all rows, so that its own part of the gradient, times W, needs no collective. Without, each rank makes
    another part of a sum that `sum_replicated` closes, and the parts are added in the backward pass.
    """
    return _GatherRows.apply(x, counts, same_use, group)


def exchange(
    x: Shaped[Tensor, " n"], sent: Sequence[int], received: Sequence[int], group: Group = None
) -> Shaped[Tensor, " m"]:
    """All to all, no gradient: of x, cut in pieces of sent[r] elements, rank r gets the r-th. Returns the received[r]
    elements of each rank r, in rank order."""
    out = x.new_empty(sum(received))
    dist.all_to_all_single(out, x, list(received), list(sent), group=group)
    return out


def counts_of_ranks(count: int, group: Group = None) -> list[int]:
    """Each rank's `count`, exchanged between hosts: waits for the slowest, but not for the device."""
    if world_size(group) == 1:
        return [count]
    counts: list[int] = [0] * world_size(group)
    dist.all_gather_object(counts, count, group=group)
    return counts


def gather_objects(value: T, group: Group = None) -> list[T]:
    """Each rank's `value`, in rank order, on every rank."""
    values: list[Any] = [value] * world_size(group)
    if len(values) > 1:
        dist.all_gather_object(values, value, group=group)
    return values


_FUNCTIONAL = {
    "all_reduce": "allreduce",
    "all_gather_into_tensor": "allgather_base",
    "reduce_scatter_tensor": "reduce_scatter_base",
}


class CountBytes(TorchDispatchMode):
    """Inside, the bytes that this rank hands to each kind of collective: counted, not derived. DTensor's collectives have
    names of their own, and are counted as what they are. Ranks that share memory do not use it: every rank counts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []
        self._inside = ExitStack()

    def __enter__(self) -> CountBytes:
        self._inside.enter_context(without_shared_memory())
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._inside.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").strip("_")
            sent = args[1] if name.startswith(("allgather", "alltoall", "reduce_scatter")) else args[0]
            tensors = [t for t in tree_leaves(sent) if isinstance(t, Tensor)]
            self.calls.append((name, sum(t.numel() * t.element_size() for t in tensors)))
        elif (
            func.namespace == "_c10d_functional"
            and (name := func._schema.name.split("::")[1].strip("_")) in _FUNCTIONAL
        ):
            self.calls.append((_FUNCTIONAL[name], args[0].numel() * args[0].element_size()))
        return func(*args, **(kwargs or {}))


def on_rank_zero(work: Callable[[], T], doing: str = "waiting for rank 0") -> T:
    """Run `work`, which takes no collective, on rank 0 alone and give its result to all, however long it takes. A UserError
    on rank 0 is raised on every rank. doing: what the work is called in messages, "indexing the shards"."""
    if world_size() == 1:
        return work()
    message: list[Any] = [None, None]
    failure: BaseException | None = None
    with waiting.awaited(doing):
        if rank() == 0:
            try:
                message[0] = work()
            except Exception as error:
                failure = error
                message[1] = _told(error)
    dist.broadcast_object_list(message, src=0)
    if failure is not None:
        raise failure
    if message[1] is not None:
        raised = UserError(*message[1])
        raised.everywhere = True
        raise raised
    return message[0]


def everywhere(work: Callable[[], T], doing: str = "waiting for all ranks") -> T:
    """Run `work`, which takes no collective, on every rank, and give each its own result, however long any of them takes.
    What fails on any rank is raised on all of them: UserErrors as one, a mistake where one of them is, whatever else as it
    is where it happened. doing: what the work is called in messages."""
    result: Any = None
    failure: Exception | None = None
    with waiting.awaited(doing):
        try:
            result = work()
        except Exception as error:
            failure = error
    if any_rank(failure is not None, torch.device("cpu")):
        told = [one for one in gather_objects(_told(failure) if failure is not None else None) if one is not None]
        if failure is not None and not isinstance(failure, UserError):
            raise failure
        raised = UserError(" ".join(dict.fromkeys(text for text, _ in told)), max(status for _, status in told))
        raised.everywhere = True
        raise raised
    return result


def _told(failure: Exception) -> tuple[str, Exit]:
    """What other ranks hear of it: the words of a UserError, and its status."""
    if isinstance(failure, UserError):
        return str(failure), failure.status
    return f"rank {rank()} failed: {failure!r}", Exit.FAULT


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` holds anywhere; every rank gets the same answer (one tiny collective and a host sync)."""
    if world_size() == 1:
        return flag
    return bool(all_reduce_sum(torch.tensor(int(flag), device=device)).item())


def barrier() -> None:
    """Wait until every rank has come here."""
    if world_size() > 1:
        dist.barrier()
