"""The trained encoder out of a checkpoint, for evaluation and for other programs."""

from __future__ import annotations

import timm
import torch
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
    config = recorded(saved.config_text(), origin=str(checkpoint / "config.yaml"))
    if weights != "first":
        encoder = build_encoder(config)
        _fill(encoder.backbone.state_dict(), saved, saved.kind_of(weights))
    else:
        torch.manual_seed(config.run.seed)
        encoder = build(config).encoder
        if config.model.init_from is not None:
            begin = pretrained.load(config.model.init_from, encoder).weights
            encoder.backbone.load_state_dict(encoder.backbone.state_dict() | begin)
    return encoder.eval(), config


@torch.no_grad()
def _fill(backbone: dict[str, Tensor], saved: Saved, kind: str) -> None:
    """Every tensor of the backbone out of the checkpoint's, one after another: one of them is in memory twice, not all."""
    there = {name.removeprefix(PREFIX): shape for name, shape in saved.shapes.items() if name.startswith(PREFIX)}
    own = {name: tuple(tensor.shape) for name, tensor in backbone.items()}
    if wrong := sorted(name for name in there.keys() | own.keys() if there.get(name) != own.get(name)):
        raise UserError(
            f"timm {timm.__version__} builds another encoder than {saved.path} holds: {len(wrong)} tensors are on one side "
            f"alone or of another shape ({', '.join(wrong[:4])}). Use the timm of the run."
        )
    for name, tensor in backbone.items():
        read = saved.whole(f"{PREFIX}{name}", kind)
        if fault := not_finite([(name, read)]):
            raise UserError(f"the encoder of {saved.path} is broken: {fault}. Use a checkpoint before it.")
        tensor.copy_(read)
