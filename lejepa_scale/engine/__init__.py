"""How parameters, gradients and optimizer state are laid out over ranks, behind one small interface."""

from lejepa_scale.engine.average import Average
from lejepa_scale.engine.base import Engine, Factory, Shard, Update
from lejepa_scale.engine.build import build_engine

__all__ = ["Average", "Engine", "Factory", "Shard", "Update", "build_engine"]
