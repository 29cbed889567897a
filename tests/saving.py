"""An engine that holds given tensors, or parts of them, for tests of saving."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lejepa_scale.checkpoint import Progress, Saver, Store
from lejepa_scale.engine.base import MOMENTS, VALUE, Engine, Shard

DEVICE = torch.device("cpu")


class Holder(Engine):
    """What Saver asks of an engine, and nothing else of one. values: whole tensors by kind and name; ranges: this rank's
    part of each by name."""

    device = DEVICE

    def __init__(
        self,
        values: dict[str, dict[str, Tensor]],
        ranges: dict[str, tuple[int, int]] | None = None,
        buffers: dict[str, Tensor] | None = None,
        updates: int = 7,
    ) -> None:
        self.values, self._buffers, self._updates = values, buffers or {}, updates
        self.ranges = ranges or {name: (0, tensor.numel()) for name, tensor in values[VALUE].items()}
        self.module: Any = SimpleNamespace(named_parameters=lambda: values[VALUE].items())

    def _not_asked(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("saving does not ask for this")

    forward = backward = step = take = settle = prepare_moments = close = _not_asked

    def shards(self) -> Iterator[Shard]:
        for name, tensor in self.values[VALUE].items():
            start, length = self.ranges[name]
            for kind in [VALUE, *(MOMENTS if self._updates else ())]:
                part = self.values[kind][name].reshape(-1)[start : start + length]
                yield Shard(name, kind, tuple(tensor.shape), start, part)

    def updates(self) -> int:
        return self._updates

    def buffers(self) -> dict[str, Tensor]:
        return self._buffers


def values(value: float) -> dict[str, dict[str, Tensor]]:
    """Two parameters, the number of each element of which tells where it stands."""

    def tensors(offset: float) -> dict[str, Tensor]:
        return {"a.weight": torch.arange(6.0).view(3, 2) + value + offset, "b": torch.tensor(value + offset)}

    return {VALUE: tensors(0), "exp_avg": tensors(100), "exp_avg_sq": tensors(200)}


def save(
    store: Store,
    step: int,
    holder: Any = None,
    probe: dict[str, Tensor] | None = None,
    metrics: dict[str, float | None] | None = None,
) -> Path:
    """A complete checkpoint of that step."""
    holder = holder or Holder(values(float(step)), buffers={"running": torch.ones(2), "count": torch.tensor(3)})
    saver = Saver(store, holder)
    saver.begin(Progress(step, "shards"), {"head": torch.ones(2)} if probe is None else probe, "run: {}\n", metrics)
    path = saver.finish()
    assert path is not None
    return path


def exported(
    source: str | Path, target: Path, kind: str = "safetensors", weights: Any = "best", verify: bool = True
) -> Any:
    """What `lejepa convert` writes of a source, compared with it."""
    from lejepa_scale.conversion import compare, convert, open_model

    model = open_model(str(source), weights)
    done = convert(model, target, kind)
    if verify:
        compare(model, target, kind, exact=done.exact, dtype=torch.float32)
    return done
