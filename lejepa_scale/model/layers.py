"""Learning rates that fall from layer to layer: how far each weight of an encoder lies below what is trained on top of it,
by timm's groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from lejepa_scale.model.encoder import Encoder


def layer_groups(model: nn.Module, layer_decay: float, weight_decay: float) -> list[dict[str, Any]]:
    """timm's groups of the parameters of a model of timm's: their `lr_scale` is 1 in the last layer, which is the classifier
    where there is one, and falls by `layer_decay` from each layer to the one before it (BEiT, arXiv 2106.08254)."""
    without: Any = getattr(model, "no_weight_decay", set)
    return param_groups_layer_decay(
        model, weight_decay=weight_decay, no_weight_decay_list=without(), layer_decay=layer_decay
    )


def layer_scales(encoder: Encoder, layer_decay: float) -> dict[str, float]:
    """The same for every parameter of an encoder, by name, with the classifier's place held by what is trained on top of it:
    layer_decay in the last block, as when the encoder is fine-tuned; 1 in a head of its own."""
    model = _UnderAHead(encoder.backbone)
    scales = {id(p): group["lr_scale"] for group in layer_groups(model, layer_decay, 0.0) for p in group["params"]}
    return {f"backbone.{name}": scales[id(p)] for name, p in encoder.backbone.named_parameters()}


class _UnderAHead(nn.Module):
    """Of a model of timm's, what its function looks at, as if it had a classifier."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.pretrained_cfg = model, model.pretrained_cfg
        self.no_weight_decay = set
        if hasattr(model, "group_matcher"):
            self.group_matcher = model.group_matcher

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.model.named_parameters()
        named = self.pretrained_cfg.get("classifier") or "head"
        yield f"{named if isinstance(named, str) else named[0]}.weight of another", nn.Parameter(torch.empty(0))
