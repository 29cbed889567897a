"""The classes of transformers that hold a vision transformer of timm's exactly: which, with what configuration, under which
names. Weights have those of transformers 4.57, which 5.x reads too and renames in memory alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lejepa_scale.conversion.model import Lazy, Model, in_memory
from lejepa_scale.conversion.timm_folder import patch_size
from lejepa_scale.errors import UserError

POSITIONS = "embeddings.position_embeddings"


class Cannot(Exception):
    """Why no class of transformers holds a model."""


class Part(NamedTuple):
    """A tensor of transformers out of one of timm's: rows of it, in another shape."""

    name: str
    source: str
    rows: slice = slice(None)


@dataclass(frozen=True)
class Mapping:
    """What a model of timm's is in a class of transformers. exact: at every size, else at the size of its positions alone.
    invented: tensors that timm's has no counterpart for, and need none. class_position: timm's table of positions has none
    for the class token, and theirs one that is added to it."""

    name: str
    exact: bool
    config: dict[str, Any]
    parts: tuple[Part, ...]
    invented: dict[str, Tensor]
    class_position: bool = False

    @property
    def pools(self) -> bool:
        """Whether its `pooler_output` is the features. ViTModel's is a layer of its own, which no weights are for."""
        return self.name != "ViTModel"


def native(model: Model) -> tuple[Mapping, dict[str, Lazy]]:
    """The class that holds a model, and its tensors. Raises UserError, with the reason and the target that can, where none
    does."""
    try:
        mapping = mapped(model.shapes)
        return mapping, _tensors(mapping, model)
    except Cannot as error:
        other = "that transformers.AutoModel loads, exactly and at every size"
        if model.arguments.get("num_classes"):
            other = "that timm loads, exactly and at every size (transformers leaves the layer out)"
        raise UserError(
            f"no class of transformers holds {model.architecture} as it is here: {error}. `--to timm` writes a folder "
            f"{other}."
        ) from error


def preprocessor(model: Model) -> dict[str, Any]:
    """preprocessor_config.json: the short side to the native size, the middle of it, standardized."""
    inputs = model.inputs
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": inputs.channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": inputs.image_size},
        "resample": 2,  # bilinear
        "do_center_crop": True,
        "crop_size": {"height": inputs.image_size, "width": inputs.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(inputs.mean),
        "image_std": list(inputs.std),
    }


def mapped(vit: Any, kind: str | None = None) -> Mapping:
    """That of a vision transformer of timm's (on the meta device) in the class `kind`, a model_type of transformers, or in
    the one that holds it. Raises Cannot."""
    _expect_plain(vit)
    if type(vit).__name__ == "Eva":
        return _dinov3(vit)
    ratio = _ratio(vit)
    return _vit_model(vit, ratio) if kind == "vit" or (kind is None and ratio is None) else _dinov2(vit, ratio)


def _tensors(mapping: Mapping, model: Model) -> dict[str, Lazy]:
    """Every row of every tensor of timm's must be used, once."""
    out = in_memory(mapping.invented)
    used: dict[str, int] = {}
    for part in mapping.parts:
        lazy = model.tensors[part.source]
        start, stop, _ = part.rows.indices(lazy.shape[0])
        used[part.source] = used.get(part.source, 0) + stop - start
        out[part.name] = Lazy((stop - start, *lazy.shape[1:]), lazy.dtype, _rows(lazy.read, slice(start, stop)))
    wrong = [name for name, lazy in model.tensors.items() if used.get(name, 0) != lazy.shape[0]]
    _refuse(wrong, f"it has {len(wrong)} tensors that they have no place for ({', '.join(wrong[:4])})")
    if mapping.class_position:
        table = out[POSITIONS]
        none = torch.zeros(1, 1, table.shape[2], dtype=table.dtype)
        shape = (1, table.shape[1] + 1, table.shape[2])
        out[POSITIONS] = Lazy(shape, table.dtype, lambda: torch.cat([none, table.read()], 1))
    return out


def _rows(read: Callable[[], Tensor], rows: slice) -> Callable[[], Tensor]:
    return lambda: read()[rows]


def _refuse(condition: Any, reason: str) -> None:
    if condition:
        raise Cannot(reason)


def _expect_plain(vit: Any) -> None:
    """What all of its classes ask of timm's model."""
    kind = type(vit).__name__
    _refuse(kind not in ("VisionTransformer", "Eva"), f"it is a {kind}, not a plain vision transformer")
    _refuse(vit.num_classes, "its features come from a linear layer after the pooling (model.head_dim)")
    _refuse(
        vit.global_pool != "token",
        f"its features are pooled by '{vit.global_pool or 'none'}', and those of these classes are the class token's",
    )
    _refuse(isinstance(vit.norm, nn.Identity), "it has no normalization after its blocks")
    for name in ("norm_pre",):
        _refuse(not isinstance(getattr(vit, name, nn.Identity()), nn.Identity), "it normalizes before its blocks")
    _refuse(patch_size(vit) is None, "its patches are not square")
    _refuse(vit.patch_embed.proj.bias is None, "its patch embedding has no bias")
    _refuse(type(vit.patch_embed).__name__ != "PatchEmbed", "its patches come out of a network")
    _refuse(not isinstance(vit.patch_embed.norm, nn.Identity), "it normalizes its patches")
    for block in vit.blocks:
        for name in ("q_norm", "k_norm", "norm"):
            _refuse(
                not isinstance(getattr(block.attn, name, nn.Identity()), nn.Identity), f"its attention has a {name}"
            )
        _refuse(not isinstance(getattr(block.mlp, "norm", nn.Identity()), nn.Identity), "its MLP has a normalization")
        _refuse(block.attn.proj.bias is None, "its attention's output has no bias")


def _linear(name: str, source: str, rows: slice = slice(None), *, bias: bool = True) -> Iterator[Part]:
    yield Part(f"{name}.weight", f"{source}.weight", rows)
    if bias:
        yield Part(f"{name}.bias", f"{source}.bias", rows)


def _thirds(width: int) -> Iterator[tuple[str, slice]]:
    """Of timm's one matrix for queries, keys and values."""
    for number, name in enumerate(("query", "key", "value")):
        yield name, slice(number * width, (number + 1) * width)


# -- Dinov2Model, Dinov2WithRegistersModel


def _dinov2(vit: Any, ratio: int | None) -> Mapping:
    width, registers = int(vit.embed_dim), _with_a_table(vit)
    gated = _gated(vit)
    _refuse(ratio is None, f"its MLP is {_hidden(vit)} wide, which no whole ratio to {width} gives there")
    config: dict[str, Any] = {
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        **_common(vit),
        "mlp_ratio": ratio,
        "layerscale_value": 1.0,
        "drop_path_rate": 0.0,
        "use_swiglu_ffn": gated,
        "apply_layernorm": True,
        "reshape_hidden_states": True,
    }
    invented = {"embeddings.mask_token": torch.zeros(1, width)}
    scaled = _names(vit, "blocks.0.ls1.gamma")
    if not scaled:
        for number in range(len(vit.blocks)):
            for which in (1, 2):
                invented[f"encoder.layer.{number}.layer_scale{which}.lambda1"] = torch.ones(width)
    parts = tuple(_dinov2_parts(vit, gated, scaled, registers))
    if not registers:
        return Mapping("Dinov2Model", False, config, parts, invented)
    config["num_register_tokens"] = registers
    return Mapping("Dinov2WithRegistersModel", True, config, parts, invented, bool(vit.no_embed_class))


def _with_a_table(vit: Any) -> int:
    """Refuses what has no table of positions as theirs; the number of registers."""
    registers = int(vit.num_prefix_tokens) - 1
    _refuse(not vit.has_class_token, "it has no class token")
    _refuse(vit.pos_embed is None, "it has no table of positions")
    places = int(vit.pos_embed.shape[1]) - vit.patch_embed.num_patches
    _refuse(registers and not vit.no_embed_class, "its registers have positions")
    _refuse(not registers and places != 1, "its class token has no position")
    grid = vit.patch_embed.grid_size
    _refuse(grid[0] != grid[1], "its grid of positions is not square")
    return registers


def _gated(vit: Any) -> bool:
    mlp = vit.blocks[0].mlp
    kind, activation = type(mlp).__name__, type(mlp.act).__name__
    gated = kind == "GluMlp"
    _refuse(kind not in ("Mlp", "GluMlp"), f"its MLP is a {kind}")
    _refuse(
        activation != ("SiLU" if gated else "GELU") or getattr(mlp.act, "approximate", "none") != "none",
        f"its activation is {activation}{' in a gated MLP' if gated else ''}",
    )
    _refuse(gated and getattr(mlp, "gate_last", True), "the gate of its MLP comes last")
    return gated


def _common(vit: Any) -> dict[str, Any]:
    """What the configurations of all of them say."""
    return {
        "hidden_size": int(vit.embed_dim),
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": int(vit.blocks[0].attn.num_heads),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": float(vit.norm.eps),
        "image_size": int(vit.patch_embed.img_size[0]),
        "patch_size": patch_size(vit),
        "num_channels": int(vit.patch_embed.proj.weight.shape[1]),
        "qkv_bias": _names(vit, "blocks.0.attn.qkv.bias"),
    }


def _names(vit: Any, name: str) -> bool:
    return name in vit.state_dict()


def _hidden(vit: Any) -> int:
    return int(vit.blocks[0].mlp.fc2.weight.shape[1])


def _ratio(vit: Any) -> int | None:
    """mlp_ratio, whole (5.x takes no other), by which the MLP is that wide: a gated one of two thirds, rounded up to 8s."""
    widths = {ratio: int(vit.embed_dim) * ratio for ratio in range(1, 17)}
    if type(vit.blocks[0].mlp).__name__ == "GluMlp":
        widths = {ratio: (int(made * 2 / 3) + 7) // 8 * 8 for ratio, made in widths.items()}
    return next((ratio for ratio, made in widths.items() if made == _hidden(vit)), None)


def _dinov2_parts(vit: Any, gated: bool, scaled: bool, registers: int) -> Iterator[Part]:
    yield Part("embeddings.cls_token", "cls_token")
    if registers:
        yield Part("embeddings.register_tokens", "reg_token")
    yield Part(POSITIONS, "pos_embed")
    yield from _linear("embeddings.patch_embeddings.projection", "patch_embed.proj")
    bias = _names(vit, "blocks.0.attn.qkv.bias")
    for number in range(len(vit.blocks)):
        ours, theirs = f"blocks.{number}", f"encoder.layer.{number}"
        yield from _linear(f"{theirs}.norm1", f"{ours}.norm1")
        for name, rows in _thirds(vit.embed_dim):
            yield from _linear(f"{theirs}.attention.attention.{name}", f"{ours}.attn.qkv", rows, bias=bias)
        yield from _linear(f"{theirs}.attention.output.dense", f"{ours}.attn.proj")
        yield from _linear(f"{theirs}.norm2", f"{ours}.norm2")
        for name, source in (("weights_in", "fc1"), ("weights_out", "fc2")) if gated else (("fc1",) * 2, ("fc2",) * 2):
            yield from _linear(f"{theirs}.mlp.{name}", f"{ours}.mlp.{source}")
        if scaled:
            for which in (1, 2):
                yield Part(f"{theirs}.layer_scale{which}.lambda1", f"{ours}.ls{which}.gamma")
    yield from _linear("layernorm", "norm")


# -- ViTModel: no layer scale, and MLPs of any width


def _vit_model(vit: Any, ratio: int | None) -> Mapping:
    registers = _with_a_table(vit)
    wide = (
        ""
        if ratio
        else f"its MLP is {_hidden(vit)} wide, which no whole ratio to {vit.embed_dim} gives in others, and "
    )
    _refuse(_gated(vit), f"{wide}ViTModel has no gated one")
    _refuse(registers, f"{wide}ViTModel has no registers")
    _refuse(_names(vit, "blocks.0.ls1.gamma"), f"{wide}ViTModel has no layer scale")
    config = {"model_type": "vit", "intermediate_size": _hidden(vit), **_common(vit)}
    return Mapping("ViTModel", False, config, tuple(_vit_model_parts(vit, config["qkv_bias"])), {})


def _vit_model_parts(vit: Any, bias: bool) -> Iterator[Part]:
    yield Part("embeddings.cls_token", "cls_token")
    yield Part(POSITIONS, "pos_embed")
    yield from _linear("embeddings.patch_embeddings.projection", "patch_embed.proj")
    for number in range(len(vit.blocks)):
        ours, theirs = f"blocks.{number}", f"encoder.layer.{number}"
        for name, rows in _thirds(vit.embed_dim):
            yield from _linear(f"{theirs}.attention.attention.{name}", f"{ours}.attn.qkv", rows, bias=bias)
        yield from _linear(f"{theirs}.attention.output.dense", f"{ours}.attn.proj")
        yield from _linear(f"{theirs}.intermediate.dense", f"{ours}.mlp.fc1")
        yield from _linear(f"{theirs}.output.dense", f"{ours}.mlp.fc2")
        yield from _linear(f"{theirs}.layernorm_before", f"{ours}.norm1")
        yield from _linear(f"{theirs}.layernorm_after", f"{ours}.norm2")
    yield from _linear("layernorm", "norm")


# -- DINOv3ViTModel


def _dinov3(vit: Any) -> Mapping:
    width = int(vit.embed_dim)
    rope = vit.rope
    _refuse(type(rope).__name__ != "RotaryEmbeddingDinoV3", "its positions are not DINOv3's rotary ones")
    _refuse(
        rope.min_period is not None or rope.normalize_coords != "separate",
        "its rotary positions are normalized in another way",
    )
    _refuse(vit.pos_embed is not None, "it has a table of positions beside rotary ones")
    _refuse(vit.cls_token is None, "it has no class token")
    block = vit.blocks[0]
    _refuse(getattr(block, "gamma_1", None) is None, "its blocks have no layer scale")
    kind = type(block.mlp).__name__
    gated = kind == "SwiGLU"
    _refuse(kind not in ("Mlp", "SwiGLU"), f"its MLP is a {kind}")
    activation = type(block.mlp.act).__name__
    _refuse(activation != ("SiLU" if gated else "GELU"), f"its activation is {activation}")
    biases = {name for name in ("q_bias", "k_bias", "v_bias") if _names(vit, f"blocks.0.attn.{name}")}
    fused = _names(vit, "blocks.0.attn.qkv.bias")
    config: dict[str, Any] = {
        "model_type": "dinov3_vit",
        "hidden_size": width,
        "intermediate_size": int(block.mlp.fc2.weight.shape[1]),
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": int(block.attn.num_heads),
        "hidden_act": "silu" if gated else "gelu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": float(vit.norm.eps),
        "rope_theta": float(rope.temperature),
        "image_size": int(vit.patch_embed.img_size[0]),
        "patch_size": patch_size(vit),
        "num_channels": int(vit.patch_embed.proj.weight.shape[1]),
        "query_bias": fused or "q_bias" in biases,
        "key_bias": fused,
        "value_bias": fused or "v_bias" in biases,
        "proj_bias": True,
        "mlp_bias": True,
        "layerscale_value": 1.0,
        "drop_path_rate": 0.0,
        "use_gated_mlp": gated,
        "num_register_tokens": 0 if vit.reg_token is None else int(vit.reg_token.shape[1]),
        "pos_embed_shift": None,
        "pos_embed_jitter": None,
        "pos_embed_rescale": None,
    }
    invented = {"embeddings.mask_token": torch.zeros(1, 1, width)}
    if vit.reg_token is None:
        invented["embeddings.register_tokens"] = torch.zeros(1, 0, width)
    return Mapping("DINOv3ViTModel", True, config, tuple(_dinov3_parts(vit, gated, biases, fused)), invented)


def _dinov3_parts(vit: Any, gated: bool, biases: set[str], fused: bool) -> Iterator[Part]:
    yield Part("embeddings.cls_token", "cls_token")
    if vit.reg_token is not None:
        yield Part("embeddings.register_tokens", "reg_token")
    yield from _linear("embeddings.patch_embeddings", "patch_embed.proj")
    for number in range(len(vit.blocks)):
        ours, theirs = f"blocks.{number}", f"layer.{number}"
        yield from _linear(f"{theirs}.norm1", f"{ours}.norm1")
        for name, rows in _thirds(vit.embed_dim):
            letter = name[0]
            yield Part(f"{theirs}.attention.{letter}_proj.weight", f"{ours}.attn.qkv.weight", rows)
            if fused:
                yield Part(f"{theirs}.attention.{letter}_proj.bias", f"{ours}.attn.qkv.bias", rows)
            elif f"{letter}_bias" in biases and letter != "k":
                yield Part(f"{theirs}.attention.{letter}_proj.bias", f"{ours}.attn.{letter}_bias")
        yield from _linear(f"{theirs}.attention.o_proj", f"{ours}.attn.proj")
        yield from _linear(f"{theirs}.norm2", f"{ours}.norm2")
        pairs = (("gate_proj", "fc1_g"), ("up_proj", "fc1_x"), ("down_proj", "fc2"))
        for name, source in pairs if gated else (("up_proj", "fc1"), ("down_proj", "fc2")):
            yield from _linear(f"{theirs}.mlp.{name}", f"{ours}.mlp.{source}")
        for which in (1, 2):
            yield Part(f"{theirs}.layer_scale{which}.lambda1", f"{ours}.gamma_{which}")
    yield from _linear("norm", "norm")
