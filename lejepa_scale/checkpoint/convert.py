"""Checkpoints into what other programs load. Offline: needs no engine, and refuses an export that gives other features."""

from __future__ import annotations

import json
from pathlib import Path

import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lejepa_scale.checkpoint.encoder import load_encoder
from lejepa_scale.checkpoint.places import Place
from lejepa_scale.checkpoint.saved import Weights
from lejepa_scale.errors import UserError

_TOLERANCE = 1e-4  # of the largest feature, or of 1, which packing and synchronized norms may round differently


def export_encoder(source: str | Place, target: Path, weights: Weights = "best") -> int:
    """Write the encoder as safetensors under timm's names, with how to build it in the metadata; number of tensors.
    weights: which of a checkpoint's, as `load_encoder` takes them."""
    encoder, config = load_encoder(source, weights=weights)
    tensors = {name: t.contiguous() for name, t in encoder.backbone.state_dict().items()}
    metadata = {
        "format": "pt",
        "encoder": config.model.encoder,
        "image_size": str(config.image_size),
        "patch_size": str(encoder.patch_size or ""),
        "features": str(encoder.embed_dim),
        "channels": str(encoder.channels),
        "mean": json.dumps(config.data.mean),
        "std": json.dumps(config.data.std),
        "ranges": json.dumps([source.ranges for source in config.data.shards]),
        "timm": json.dumps(encoder.timm_arguments),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target, metadata)
    return len(tensors)


def verify_export(source: str | Place, target: Path, weights: Weights = "best") -> float:
    """Rebuild the model with timm alone and compare its features with the checkpoint's; the largest difference, as a share
    of the largest feature where that is more than 1.

    Raises UserError where they differ.
    """
    encoder, config = load_encoder(source, weights=weights)
    with safe_open(target, "pt") as file:
        plain = timm.create_model(**json.loads(file.metadata()["timm"])).eval()
        plain.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
    images = torch.randn(
        2, encoder.channels, config.image_size, config.image_size, generator=torch.Generator().manual_seed(0)
    )
    with torch.inference_mode():
        expected = plain(images)
        difference = float((encoder([images])[0] - expected).abs().max() / expected.abs().max().clamp_min(1))
    if not difference <= _TOLERANCE:  # NaN is no agreement
        raise UserError(f"{target} gives features that differ by {difference:.1e} from the checkpoint's.")
    return difference
