"""Where numbers first stop being numbers: a watch over every operation of a forward and a backward pass, which knows in
which module each belongs. Looks at values, and waits for the device at each: for a step that is taken again, not for
training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_UNWRITTEN = ("empty", "new_empty", "resize", "set_")  # give memory as it is, whatever was there
_MODULE = "module of lejepa_scale"  # among a node's metadata


@dataclass(frozen=True)
class Found:
    """The first operation whose result is not finite. alone: its inputs were; else they came so from what cannot be watched
    (a kernel of our own, another rank). largest: the largest finite magnitude among its inputs."""

    phase: str
    module: str
    operation: str
    shape: tuple[int, ...]
    values: int  # that are not finite
    alone: bool
    largest: float

    def __str__(self) -> str:
        shape = " x ".join(map(str, self.shape)) or "one number"
        came = (
            f"from finite inputs, of which the largest is {self.largest:.3g}"
            if self.alone
            else "and its inputs were not finite either: they come from another rank, or a kernel that cannot be watched"
        )
        return (
            f"{self.phase}, {self.module or 'outside of the modules'}: {self.operation} gave {self.values:,} values that "
            f"are no numbers (of {shape}), {came}"
        )


class Hunt(TorchDispatchMode):
    """Inside `watching(module)`, remembers the first operation that is not finite: `found`. `phase` names what is under
    way."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Found | None = None
        self._phase = "before"
        self._inside: list[str] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """In one thread, so that the backward pass is seen on every device."""
        hooks = []
        for name, part in module.named_modules():
            hooks.append(part.register_forward_pre_hook(lambda *_, name=name: self._inside.append(name)))
            hooks.append(part.register_forward_hook(self._leaves(name), always_call=True))
        try:
            with torch.autograd.set_multithreading_enabled(False), self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _leaves(self, name: str) -> Any:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            if self._inside and self._inside[-1] == name:
                self._inside.pop()
            _label(output, inputs, name)

        return hook

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if self.found is None and not func.is_view and not name.startswith(_UNWRITTEN):
            self._look(func, out, [args, kwargs or {}])
        return out

    def _look(self, func: Any, out: Any, given: Any) -> None:
        for result in _numbers(out):
            bad = int((~torch.isfinite(result)).sum())
            if not bad:
                continue
            inputs = [tensor for tensor in _numbers(given) if tensor is not result]
            finite = [torch.isfinite(tensor) for tensor in inputs]
            alone = all(bool(each.all()) for each in finite)
            if alone and any(_is_infinite(leaf) for leaf in tree_leaves(given)):
                return  # a mask's minus infinity
            largest = max(
                (float(tensor[mask].abs().max()) for tensor, mask in zip(inputs, finite, strict=True) if mask.any()),
                default=0.0,
            )
            self.found = Found(self._phase, self._module(), str(func), tuple(result.shape), bad, alone, largest)
            return

    def _module(self) -> str:
        if self._inside:
            return self._inside[-1]
        node = torch._C._current_autograd_node()
        return str(_metadata(node).get(_MODULE, "")) if node is not None else ""


def _numbers(tree: Any) -> list[Tensor]:
    return [
        leaf
        for leaf in tree_leaves(tree)
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel() and not leaf.is_meta
    ]


def _metadata(node: Any) -> dict[str, object]:
    return node.metadata  # type: ignore[no-any-return]


def _is_infinite(leaf: Any) -> bool:
    return isinstance(leaf, float) and leaf in (float("inf"), float("-inf"))


def _label(output: Any, inputs: Any, name: str) -> None:
    """Write a module's name on the nodes of the graph that lie between its inputs and its outputs; those of inner modules
    have theirs already."""
    ends = {tensor.grad_fn for tensor in tree_leaves(inputs) if isinstance(tensor, Tensor)}
    ahead = [tensor.grad_fn for tensor in tree_leaves(output) if isinstance(tensor, Tensor)]
    seen = set(ends)
    while ahead:
        if (node := ahead.pop()) is not None and node not in seen:
            seen.add(node)
            _metadata(node).setdefault(_MODULE, name)
            ahead += [before for before, _ in node.next_functions]
