"""The training state in one layout that every engine reads and writes: full fp32 tensors under the module's own names.
Knows no engine and no file format."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class CanonicalState:
    """What rank 0 holds; CPU tensors. `moments[kind][name]` is AdamW's state, empty before the first update."""

    model: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    updates: int = 0  # optimizer updates applied: AdamW's bias correction
