"""From tar shards to batches of views: index, order, bytes, decoding, crops, colours, and the loader that joins them."""

from lejepa_scale.data.device import ahead
from lejepa_scale.data.loader import Batch, Loader, evaluation_batches, open_sources

__all__ = ["Batch", "Loader", "ahead", "evaluation_batches", "open_sources"]
