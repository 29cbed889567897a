"""Saving a run and finding it again."""

from lejepa_scale.checkpoint.encoder import load_encoder
from lejepa_scale.checkpoint.saved import Progress, Saved, Weights
from lejepa_scale.checkpoint.saver import Saver
from lejepa_scale.checkpoint.state import CanonicalState, gather, restore, restore_average, spread
from lejepa_scale.checkpoint.store import Store, find

__all__ = [
    "CanonicalState",
    "Progress",
    "Saved",
    "Saver",
    "Store",
    "Weights",
    "find",
    "gather",
    "load_encoder",
    "restore",
    "restore_average",
    "spread",
]
