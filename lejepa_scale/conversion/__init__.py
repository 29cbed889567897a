"""Encoders for other programs: out of any checkpoint, into what timm, transformers and onnxruntime load."""

from lejepa_scale.conversion.model import Model
from lejepa_scale.conversion.source import Given, open_model
from lejepa_scale.conversion.targets import STATES, TARGETS, Converted, convert, convert_state, open_state
from lejepa_scale.conversion.verify import Difference, compare

__all__ = [
    "STATES",
    "TARGETS",
    "Converted",
    "Difference",
    "Given",
    "Model",
    "compare",
    "convert",
    "convert_state",
    "open_model",
    "open_state",
]
