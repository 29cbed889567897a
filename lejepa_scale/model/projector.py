"""Heads on the encoder's features: the projector whose output the objective sees, and the optional predictor."""

from itertools import pairwise
from typing import Literal

from torch import nn

from lejepa_scale.model.norm import BatchNorm

_ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


class Projector(nn.Sequential):
    """`layers` linear maps, [B, in_dim] -> [B, dim], with BatchNorm and an activation between them (all views in one
    batch). Linear maps before a BatchNorm have no bias, which it would take away again."""

    def __init__(
        self, in_dim: int, hidden: int, dim: int, layers: int, activation: Literal["gelu", "relu"] = "gelu"
    ) -> None:
        widths = [in_dim, *[hidden] * (layers - 1), dim]
        parts: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(widths)):
            last = i == layers - 1
            parts += (
                [nn.Linear(a, b)]
                if last
                else [nn.Linear(a, b, bias=False), BatchNorm(b, act=_ACTIVATIONS[activation]())]
            )
        super().__init__(*parts)


class Predictor(nn.Sequential):
    """A two-layer JEPA predictor, [B, dim] -> [B, dim]: each view's embedding towards the global views' mean."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
