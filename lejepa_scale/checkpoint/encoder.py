"""The trained encoder out of a checkpoint, for evaluation and for other programs."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lejepa_scale.checkpoint import pretrained
from lejepa_scale.checkpoint.store import find, not_finite, verify
from lejepa_scale.config import Config, recorded
from lejepa_scale.errors import UserError
from lejepa_scale.model import Encoder, build, build_encoder

PREFIX = "encoder.backbone."  # before timm's names in a checkpoint


def load_encoder(path: Path, *, trained: bool = True) -> tuple[Encoder, Config]:
    """Encoder (CPU, fp32, eval mode) and configuration of a run directory or one of its checkpoints.

    `trained=False` gives the weights the run began with: the seed's, or those of `model.init_from`, read from there again.
    Raises UserError for anything that is not a checkpoint, and for weights to begin with that are no longer there.
    """
    checkpoint = find(Path(path))
    verify(checkpoint)
    config = recorded(yaml.safe_load((checkpoint / "config.yaml").read_text()), origin=str(checkpoint / "config.yaml"))
    if trained:
        encoder, weights = build_encoder(config), encoder_weights(checkpoint)
        if fault := not_finite(weights):
            raise UserError(f"the encoder of {checkpoint} is broken: {fault}. Use a checkpoint before it.")
        encoder.backbone.load_state_dict(weights)  # strict: every name on both sides
    else:
        torch.manual_seed(config.run.seed)
        encoder = build(config).encoder
        if config.model.init_from is not None:
            begin = pretrained.load(config.model.init_from, encoder).weights
            encoder.backbone.load_state_dict(encoder.backbone.state_dict() | begin)
    return encoder.eval(), config


def encoder_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The encoder's tensors under timm's own names. Raises UserError where the file cannot be read."""
    try:
        with safe_open(checkpoint / "model.safetensors", "pt") as file:
            return {k.removeprefix(PREFIX): file.get_tensor(k) for k in file.keys() if k.startswith(PREFIX)}
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {checkpoint / 'model.safetensors'}: {error}.") from error
