"""Folders of transformers' own classes as sources: which model of timm's equals one, and its tensors under timm's names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lejepa_scale.conversion import native
from lejepa_scale.conversion.model import Features, Inputs, Lazy, Model, built_on_meta, expect_shapes, of_timm
from lejepa_scale.errors import UserError

CLASSES = {
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
    "vit": "ViTModel",
}
_COMMON = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "gelu", "image_size": 224,
    "num_channels": 3, "qkv_bias": True, "layer_norm_eps": 1e-6,
}  # fmt: skip
_DINOV2 = {**_COMMON, "mlp_ratio": 4, "use_swiglu_ffn": False}
DEFAULTS: dict[str, dict[str, Any]] = {  # of transformers 4.57 to 5.24: what a config.json may leave unsaid
    "dinov2": {**_DINOV2, "patch_size": 14},
    "dinov2_with_registers": {**_DINOV2, "patch_size": 16, "num_register_tokens": 4},
    "vit": {**_COMMON, "patch_size": 16, "intermediate_size": 3072, "layer_norm_eps": 1e-12},
    "dinov3_vit": {
        "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "hidden_act": "gelu", "image_size": 224,
        "num_channels": 3, "layer_norm_eps": 1e-5, "patch_size": 16, "intermediate_size": 1536, "rope_theta": 100.0,
        "query_bias": True, "key_bias": False, "value_bias": True, "proj_bias": True, "mlp_bias": True,
        "use_gated_mlp": False, "num_register_tokens": 0,
    },
}  # fmt: skip
_NAMES = {  # of timm's, by width; the first where none has it
    "dinov2": {384: "vit_small_patch14_dinov2", 768: "vit_base_patch14_dinov2", 1024: "vit_large_patch14_dinov2"},
    "dinov2, gated": {1536: "vit_giant_patch14_dinov2"},
    "dinov2_with_registers": {
        384: "vit_small_patch14_reg4_dinov2",
        768: "vit_base_patch14_reg4_dinov2",
        1024: "vit_large_patch14_reg4_dinov2",
    },
    "dinov2_with_registers, gated": {1536: "vit_giant_patch14_reg4_dinov2"},
    "vit": {
        768: "vit_base_patch16_224", 192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224",
        1024: "vit_large_patch16_224", 1280: "vit_huge_patch14_224",
    },
    "dinov3_vit": {384: "vit_small_patch16_dinov3", 768: "vit_base_patch16_dinov3", 1024: "vit_large_patch16_dinov3"},
    "dinov3_vit, gated": {
        384: "vit_small_plus_patch16_dinov3", 1280: "vit_huge_plus_patch16_dinov3", 4096: "vit_7b_patch16_dinov3",
    },
}  # fmt: skip
_PREFIXES = {
    "dinov2": "dinov2.",
    "dinov2_with_registers": "dinov2_with_registers.",
    "vit": "vit.",
    "dinov3_vit": "model.",
}
_NO_FEATURES = ("embeddings.mask_token", "pooler.", "classifier.")  # of masked tokens, and behind the class token
_SMALL_EPS = 1e-6  # added to variances of activations, which are far larger


def model(folder: Path, about: dict[str, Any], tensors: dict[str, Lazy]) -> Model:
    """The model of timm's that the class in config.json, `about`, equals, with the weights of the folder. Raises UserError,
    by key or name, where none does."""
    kind = str(about["model_type"])
    where = folder / "config.json"
    said = {**DEFAULTS[kind], **about}
    if isinstance(rotary := about.get("rope_parameters"), dict) and "rope_theta" in rotary:
        said["rope_theta"] = rotary["rope_theta"]
    try:
        name, arguments = _of_timm(where, kind, said)
        shapes = built_on_meta(str(where), name, arguments)
        mapping = native.mapped(shapes, kind)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{where} does not describe a {CLASSES[kind]} ({type(error).__name__}: {error}).") from error
    except native.Cannot as error:
        raise UserError(f"{where}: no model of timm's is this {CLASSES[kind]}: {error}.") from error
    _expect_equal(where, mapping, said)
    inside, left_out = _inside(kind, tensors)
    made = _under_timms_names(str(folder), mapping, shapes.state_dict(), inside)
    found = of_timm(str(folder), name, arguments, _inputs(folder, said), made, {"encoder": name})
    features = partial(features_of, folder) if find_spec("transformers") else None
    return replace(found, exact=mapping.exact, left_out=tuple(left_out), source_features=features)


# -- which model


def _of_timm(where: Path, kind: str, said: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and arguments, of which only those are given in which the name's own model is another."""
    gated = bool(said.get("use_swiglu_ffn") or said.get("use_gated_mlp"))
    names = _NAMES.get(f"{kind}{', gated' * gated}")
    if names is None:
        raise native.Cannot("its MLP is gated")
    width = int(said["hidden_size"])
    name = names.get(width) or next(iter(names.values()))
    if kind == "dinov3_vit" and said["query_bias"]:
        name += "_qkvb"
    arguments: dict[str, Any] = {"img_size": int(said["image_size"]), "num_classes": 0, "dynamic_img_size": True}
    if int(said["num_channels"]) != 3:
        arguments["in_chans"] = int(said["num_channels"])
    if kind == "dinov3_vit":
        arguments["global_pool"] = "token"
    usual = built_on_meta(str(where), name, arguments)
    wanted: dict[str, tuple[Any, Any]] = {
        "patch_size": (native.patch_size(usual), int(said["patch_size"])),
        "embed_dim": (usual.embed_dim, width),
        "depth": (len(usual.blocks), int(said["num_hidden_layers"])),
        "num_heads": (usual.blocks[0].attn.num_heads, int(said["num_attention_heads"])),
    }
    if kind == "dinov3_vit":
        wanted["rope_temperature"] = (usual.rope.temperature, float(said["rope_theta"]))
        wanted["num_reg_tokens"] = (usual.num_prefix_tokens - 1, int(said["num_register_tokens"]))
    elif kind == "dinov2_with_registers":
        wanted["reg_tokens"] = (usual.num_prefix_tokens - 1, int(said["num_register_tokens"]))
    if kind != "dinov3_vit":
        wanted["qkv_bias"] = (usual.blocks[0].attn.qkv.bias is not None, bool(said["qkv_bias"]))
    arguments |= {key: value for key, (usually, value) in wanted.items() if value != usually}
    hidden = _hidden(said, width, gated)
    if hidden != usual.blocks[0].mlp.fc2.weight.shape[1] or "embed_dim" in arguments:
        # timm rounds down what it multiplies: half a unit more is the wanted one
        made = 2 * hidden if gated and kind != "dinov3_vit" else hidden
        arguments["mlp_ratio"] = made / width if made % width == 0 else (made + 0.5) / width
    return name, arguments


def _hidden(said: dict[str, Any], width: int, gated: bool) -> int:
    if "mlp_ratio" not in said:
        return int(said["intermediate_size"])
    hidden = int(width * said["mlp_ratio"])
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden


_OF_TRAINING = {
    "initializer_range", "hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "layerscale_value",
    "drop_path_rate", "pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale",
}  # fmt: skip
_OF_BACKBONES = {"apply_layernorm", "reshape_hidden_states"}  # of feature maps, which other classes give


def _expect_equal(where: Path, mapping: native.Mapping, said: dict[str, Any]) -> None:
    """Everything that the model would be written as is what the folder says."""
    for key, value in mapping.config.items():
        if key in _OF_TRAINING | _OF_BACKBONES or key not in said:
            continue
        number = isinstance(said[key], int | float)
        close = key == "layer_norm_eps" and number and 0 < said[key] <= _SMALL_EPS and value <= _SMALL_EPS
        if key == "hidden_act" and said.get("use_swiglu_ffn"):
            continue  # DINOv2's gated MLP has SiLU whatever is said
        if said[key] != value and not close:
            raise UserError(
                f"{where}: {key}={said[key]!r} is of no model of timm's, whose {mapping.name} has {value!r}."
            )


# -- its tensors


def _inside(kind: str, tensors: dict[str, Lazy]) -> tuple[dict[str, Lazy], list[str]]:
    """Without the prefix of classes with a head, and without what is no part of features; the names of the latter."""
    prefix = _PREFIXES[kind]
    inside, left_out = dict[str, Lazy](), list[str]()
    for name, lazy in tensors.items():
        short = name.removeprefix(prefix)
        if short.startswith(_NO_FEATURES):
            left_out.append(name)
        else:
            inside[short] = lazy
    return inside, left_out


def _under_timms_names(
    where: str, mapping: native.Mapping, timms: Mapping[str, Tensor], tensors: dict[str, Lazy]
) -> dict[str, Lazy]:
    invented = {name for name in mapping.invented if not name.startswith(_NO_FEATURES)}
    expected = {part.name: tuple(timms[part.source][part.rows].shape) for part in mapping.parts}
    expected |= {name: tuple(mapping.invented[name].shape) for name in invented}
    if mapping.class_position:
        batch, places, width = expected[native.POSITIONS]
        expected[native.POSITIONS] = (batch, places + 1, width)
    expect_shapes(where, tensors, expected)
    parts: dict[str, list[native.Part]] = {}
    for part in mapping.parts:
        parts.setdefault(part.source, []).append(part)
    out = {source: _joined([tensors[part.name] for part in of_one]) for source, of_one in parts.items()}
    for name in invented:  # layer scales, which timm's model has not
        if not torch.equal(tensors[name].read().float(), mapping.invented[name]):
            raise UserError(f"{where}: {name} is not one everywhere, and the model of timm's has no such tensor.")
    if mapping.class_position:
        token, table = out["cls_token"], out["pos_embed"]
        shape = (table.shape[0], table.shape[1] - 1, table.shape[2])
        out["cls_token"] = Lazy(token.shape, token.dtype, lambda: token.read() + table.read()[:, :1])
        out["pos_embed"] = Lazy(shape, table.dtype, lambda: table.read()[:, 1:])
    return out


def _joined(parts: list[Lazy]) -> Lazy:
    """The rows of all, one after another."""
    first = parts[0]
    if len(parts) == 1:
        return first
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    return Lazy(shape, first.dtype, lambda: torch.cat([part.read() for part in parts]))


def _inputs(folder: Path, said: dict[str, Any]) -> Inputs:
    """Mean and standard deviation are in preprocessor_config.json, and nowhere else."""
    path = folder / "preprocessor_config.json"
    try:
        how = json.loads(path.read_text())
        if how.get("do_rescale", True) is not True or abs(how.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
            raise UserError(f"{path} does not scale images by 1/255: its mean and deviation are of other values.")
        mean, std = (tuple(map(float, how[key])) for key in ("image_mean", "image_std"))
        if how.get("do_normalize", True) is not True:
            mean, std = (0.0,) * len(mean), (1.0,) * len(std)
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing, which says mean and standard deviation of the images: bring it into the folder."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}).") from error
    return Inputs(int(said["image_size"]), int(said["num_channels"]), mean, std)


# -- as transformers runs it


def features_of(folder: Path) -> Features:
    """Features and patch tokens by transformers' own class. Raises UserError where it does not find its weights."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    options = {"add_pooling_layer": False} if kind == "vit" else {}
    loaded = load(folder, CLASSES[kind], **options)
    skipped = 1 + int(getattr(loaded.config, "num_register_tokens", 0) or 0)
    sizes = {"interpolate_pos_encoding": True} if kind == "vit" else {}

    def features(images: Tensor) -> tuple[Tensor, Tensor]:
        found = loaded(pixel_values=images, **sizes)
        tokens = found.last_hidden_state
        return tokens[:, 0] if kind == "vit" else found.pooler_output, tokens[:, skipped:]

    return features


def load(folder: Path, loader: str, **options: Any) -> Any:
    """By a class of transformers, in fp32 and eval mode. Raises UserError where weights are missing or left over, but for
    those behind the class token."""
    import transformers

    loaded, info = getattr(transformers, loader).from_pretrained(folder, output_loading_info=True, **options)
    names = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys")}
    wrong = [name for of_kind in names.values() for name in of_kind if not name.startswith(_NO_FEATURES)]
    if wrong:
        raise UserError(
            f"transformers {transformers.__version__} does not find its weights in {folder}: {', '.join(wrong[:4])}."
        )
    return loaded.float().eval()
