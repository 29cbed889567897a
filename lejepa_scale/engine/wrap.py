"""What sharding engines do to a module before they own it: where to cut it, and how to build it without memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lejepa_scale.model import Encoder


def sharding_units(module: nn.Module) -> list[nn.Module]:
    """The encoder's repeated blocks; what is left belongs to the root."""
    return [block for part in module.modules() if isinstance(part, Encoder) for block in part.blocks]


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, every parameter becomes a meta tensor as it is registered; buffers keep their values."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
