"""A folder that timm and transformers load alike: config.json in timm's form, which transformers' TimmWrapper reads, and the
weights under timm's names."""

from __future__ import annotations

import json
from typing import Any

from lejepa_scale.conversion.model import Model

_OF_TRAINING = ("drop_path_rate", "drop_rate", "proj_drop_rate", "attn_drop_rate", "pos_drop_rate", "patch_drop_rate")


def config(model: Model) -> dict[str, Any]:
    """config.json. Everything that a published tag of the architecture says of its inputs is replaced: timm would answer
    518 pixels for a DINOv2 size, or CLIP's mean, whatever these weights have learned on."""
    inputs = model.inputs
    arguments = {
        key: value
        for key, value in model.arguments.items()
        if key not in ("num_classes", *_OF_TRAINING)  # transformers hands num_classes over by itself
    }
    classes = int(model.arguments.get("num_classes", 0))
    published = {
        key: value
        for key, value in dict(getattr(model.shapes, "pretrained_cfg", None) or {}).items()
        if key in ("pool_size", "first_conv", "classifier")
    }
    about: dict[str, Any] = {
        "architecture": model.architecture,
        "num_classes": classes,
        "num_features": int(model.shapes.num_features),
        "global_pool": getattr(model.shapes, "global_pool", None) or "avg",
        "model_args": arguments,
        "pretrained_cfg": {
            **published,
            "tag": "lejepa",
            "custom_load": False,
            "input_size": [inputs.channels, inputs.image_size, inputs.image_size],
            "fixed_input_size": not model.arguments.get("dynamic_img_size", True),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(inputs.mean),
            "std": list(inputs.std),
            "num_classes": classes,
        },
        "lejepa_scale": {"run": model.facts, **({"ranges": list(inputs.ranges)} if inputs.ranges else {})},
    }
    if not isinstance(about["global_pool"], str):
        about["global_pool"] = "avg"
    if model.facts.get("license"):
        about["pretrained_cfg"]["license"] = model.facts["license"]
    return about


def metadata(model: Model) -> dict[str, str]:
    """Of one safetensors file, which says how to build the model by itself."""
    inputs = model.inputs
    return {
        "encoder": str(model.facts.get("encoder") or model.architecture),
        "image_size": str(inputs.image_size),
        "patch_size": str(patch_size(model.shapes) or ""),
        "features": str(int(model.arguments.get("num_classes") or 0) or int(model.shapes.head_hidden_size)),
        "channels": str(inputs.channels),
        "mean": json.dumps(list(inputs.mean)),
        "std": json.dumps(list(inputs.std)),
        "ranges": json.dumps(list(inputs.ranges)),
        "timm": json.dumps({"model_name": model.architecture, **_without_training(model.arguments)}),
    }


def _without_training(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key not in _OF_TRAINING}


def patch_size(backbone: Any) -> int | None:
    """Pixels per token side, of which an image's side is a multiple; None where there are no such patches."""
    embed: Any = getattr(backbone, "patch_embed", None)
    if not hasattr(embed, "feat_ratio"):
        return None
    sides = set(embed.feat_ratio(as_scalar=False))
    return sides.pop() if len(sides) == 1 else None
