"""Saving a run and finding it again."""

from lejepa_scale.checkpoint.encoder import load_encoder
from lejepa_scale.checkpoint.saved import Progress, Saved
from lejepa_scale.checkpoint.saver import Saver
from lejepa_scale.checkpoint.state import CanonicalState, gather, restore, spread
from lejepa_scale.checkpoint.store import Store

__all__ = ["CanonicalState", "Progress", "Saved", "Saver", "Store", "gather", "load_encoder", "restore", "spread"]
