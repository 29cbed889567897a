"""The trained encoder out of a checkpoint, for evaluation and for other programs."""

from __future__ import annotations

import torch
import yaml
from torch import Tensor

from lejepa_scale.checkpoint import pretrained
from lejepa_scale.checkpoint.places import Place
from lejepa_scale.checkpoint.saved import Saved, Weights, not_finite, verify
from lejepa_scale.checkpoint.store import find
from lejepa_scale.config import Config, recorded
from lejepa_scale.errors import UserError
from lejepa_scale.model import Encoder, build, build_encoder

PREFIX = "encoder.backbone."  # before timm's names in a checkpoint


def load_encoder(path: str | Place, *, weights: Weights = "best") -> tuple[Encoder, Config]:
    """Encoder (CPU, fp32, eval mode) and configuration of a run directory or one of its checkpoints, which may lie
    in a store (s3://bucket/run).

    weights: `trained`; `average`, that along the way, where the run keeps one; `best`: the average where there is one, else
    trained; `first`: those the run began with, the seed's or those of `model.init_from`, read from there again. Raises
    UserError for anything that is not a checkpoint, for an average that was not kept, and for weights to begin with that
    are no longer there.
    """
    checkpoint = find(path)
    verify(checkpoint, moments=False)
    saved = Saved(checkpoint)
    config = recorded(yaml.safe_load(saved.config_text()), origin=str(checkpoint / "config.yaml"))
    if weights != "first":
        encoder, tensors = build_encoder(config), encoder_weights(saved, weights)
        if fault := not_finite(tensors.items()):
            raise UserError(f"the encoder of {checkpoint} is broken: {fault}. Use a checkpoint before it.")
        encoder.backbone.load_state_dict(tensors)  # strict: every name on both sides
    else:
        torch.manual_seed(config.run.seed)
        encoder = build(config).encoder
        if config.model.init_from is not None:
            begin = pretrained.load(config.model.init_from, encoder).weights
            encoder.backbone.load_state_dict(encoder.backbone.state_dict() | begin)
    return encoder.eval(), config


def encoder_weights(saved: Saved, weights: Weights) -> dict[str, Tensor]:
    """The encoder's tensors under timm's own names. Raises UserError where a file cannot be read, or there is no average."""
    kind = saved.kind_of(weights)
    return {name.removeprefix(PREFIX): saved.whole(name, kind) for name in saved.shapes if name.startswith(PREFIX)}
