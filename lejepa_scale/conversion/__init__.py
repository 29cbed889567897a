"""Encoders for other programs: out of any checkpoint, into what timm, transformers and onnxruntime load."""

from lejepa_scale.conversion.convert import TARGETS, Converted, convert
from lejepa_scale.conversion.source import Given, Model, open_model
from lejepa_scale.conversion.verify import Difference, compare

__all__ = ["TARGETS", "Converted", "Difference", "Given", "Model", "compare", "convert", "open_model"]
