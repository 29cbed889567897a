"""The trained encoder out of a checkpoint or an export, for evaluation and for other programs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lejepa_scale.checkpoint.store import find, verify
from lejepa_scale.config import Config, recorded
from lejepa_scale.errors import UserError
from lejepa_scale.model import Encoder, build, build_encoder

_PREFIX = "encoder.backbone."


def load_encoder(path: Path, *, trained: bool = True) -> tuple[Encoder, Config]:
    """Encoder (CPU, fp32, eval mode) and configuration of a run directory or one of its checkpoints.

    `trained=False` gives the weights the run began with. Raises UserError for anything that is not a checkpoint.
    """
    checkpoint = find(Path(path))
    verify(checkpoint)
    config = recorded(yaml.safe_load((checkpoint / "config.yaml").read_text()), origin=str(checkpoint / "config.yaml"))
    if trained:
        encoder = build_encoder(config)
        encoder.backbone.load_state_dict(encoder_weights(checkpoint))  # strict: every name on both sides
    else:
        torch.manual_seed(config.run.seed)
        encoder = build(config).encoder
    return encoder.eval(), config


def encoder_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The encoder's tensors under timm's own names. Raises UserError where the file cannot be read."""
    try:
        with safe_open(checkpoint / "model.safetensors", "pt") as file:
            return {k.removeprefix(_PREFIX): file.get_tensor(k) for k in file.keys() if k.startswith(_PREFIX)}
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {checkpoint / 'model.safetensors'}: {error}.") from error


def export_encoder(path: Path, target: Path) -> int:
    """Write the encoder as safetensors under timm's names, with how to build it in the metadata; number of tensors.
    Raises UserError where `path` is not a checkpoint."""
    encoder, config = load_encoder(path)
    weights = {name: t.contiguous() for name, t in encoder.backbone.state_dict().items()}
    metadata = {
        "format": "pt",
        "encoder": config.model.encoder,
        "image_size": str(config.image_size),
        "patch_size": str(encoder.patch_size or ""),
        "features": str(encoder.embed_dim),
        "timm": json.dumps(encoder.timm_arguments),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, target, metadata)
    return len(weights)
