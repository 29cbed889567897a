"""Encoder, projector and the LeJEPA module that joins them to the objective."""

from lejepa_scale.model.encoder import Encoder
from lejepa_scale.model.lejepa import LeJEPA, Replay, build, build_encoder, check

__all__ = ["Encoder", "LeJEPA", "Replay", "build", "build_encoder", "check"]
