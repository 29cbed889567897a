"""Saving a run and finding it again."""

from lejepa_scale.checkpoint.encoder import load_encoder
from lejepa_scale.checkpoint.state import CanonicalState, gather, spread
from lejepa_scale.checkpoint.store import Progress, Store

__all__ = ["CanonicalState", "Progress", "Store", "gather", "load_encoder", "spread"]
