"""From tar shards to batches of views: index, order, bytes, decoding, crops, colours, and the loader that joins them."""

from lejepa_scale.data.batch import Batch
from lejepa_scale.data.device import Beside
from lejepa_scale.data.evaluation import evaluation_batches
from lejepa_scale.data.images.pixels import Pixels
from lejepa_scale.data.loader import Loader
from lejepa_scale.data.mixture import Mixture, open_mixture

__all__ = ["Batch", "Beside", "Loader", "Mixture", "Pixels", "evaluation_batches", "open_mixture"]
