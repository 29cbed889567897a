"""FLOPs of an optimizer step on one rank, by formula, over the tokens that are really processed.

A linear layer takes 2 FLOPs per token and weight, the two products of attention 4 per (query, key) pair and channel; the
backward pass takes twice the forward's, once for the inputs and once for the weights, and once where the inputs need no
gradient. Normalization, activations and SIGReg's sines are not counted: they are not products of matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from timm.layers import PatchEmbed
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lejepa_scale.config import BatchPlan, Config
from lejepa_scale.model import Encoder, LeJEPA, build
from lejepa_scale.model.attention import Packing
from lejepa_scale.model.packed import PackedBlock
from lejepa_scale.objective import Regularizer, SIGReg, VISReg, WeakSIGReg

_FORWARD_AND_BACKWARD = 3
_KEPT_MODULES = 4  # a plan asks for few over and over again
_built: dict[str, LeJEPA] = {}


@dataclass(frozen=True)
class StepFlops:
    """Forward and backward passes of all micro-batches of a step on one rank. The parts are work that the result needs;
    `total` is what MFU divides by the peak."""

    patch_embedding: int
    positions: int  # their table, resampled for views of other sizes
    attention: int  # queries by keys, and scores by values
    attention_linear: int
    mlp: int
    pooling: int  # heads of timm that pool with weights, and a linear layer after them
    whole_encoder: int  # of a model that is not packed, where the parts above are 0
    projector: int
    predictor: int
    regularizer: int
    recomputed: int  # what activation checkpointing computes again
    replayed: int  # what objective.accumulation=exact adds to be exact
    tokens: int  # that enter the blocks: without the patches that are left out
    tokens_processed: float  # by a residual branch, on average: less where stochastic depth leaves sequences out

    @property
    def total(self) -> int:
        """Model FLOPs: without what is computed twice."""
        encoder = (
            self.patch_embedding + self.positions + self.attention + self.attention_linear + self.mlp + self.pooling
        )
        return encoder + self.whole_encoder + self.projector + self.predictor + self.regularizer

    @property
    def hardware(self) -> int:
        """With what is computed twice. Of `selective` checkpointing nothing is counted, since it keeps what products give;
        of `budget` nothing either, although compile may compute products again: there this is a lower bound."""
        return self.total + self.recomputed + self.replayed


def step_flops(config: Config, plan: BatchPlan) -> StepFlops:
    """FLOPs of a step in training mode, for the batches of `plan`."""
    model = meta_model(config)
    encoder, groups = model.encoder, views_of(config, plan.micro_batch)
    sequences, times = sum(n for n, _ in groups), plan.accumulation
    parts = _packed_encoder(encoder, groups) if encoder.packed else _whole_encoder(encoder, groups)
    parts |= {
        "projector": _FORWARD_AND_BACKWARD * sequences * linear(model.projector),
        "predictor": _FORWARD_AND_BACKWARD * sequences * linear(model.predictor),
        "regularizer": _regularizer(model.loss.regularizer, sequences, config),
    }
    encode = (parts["patch_embedding"] + parts["positions"]) // 2 + (
        _blocks(parts) + parts["pooling"] + parts["whole_encoder"]
    ) // 3
    heads = parts["projector"] + parts["predictor"] + parts["regularizer"]
    exact = times > 1 and config.objective.accumulation == "exact"
    full = config.engine.activation_checkpointing == "full"
    packing = encoder.packing(groups) if encoder.packed else Packing(())
    return StepFlops(
        **{name: times * part for name, part in parts.items()},
        recomputed=times * (_blocks(parts) + parts["whole_encoder"]) // _FORWARD_AND_BACKWARD if full else 0,
        replayed=times * (encode + (times - 1) * heads) if exact else 0,
        tokens=times * packing.tokens,
        tokens_processed=times * _tokens_processed(encoder, packing),
    )


def meta_model(config: Config) -> LeJEPA:
    """The configured module without memory: names and shapes. One of the last few is given again, for nobody to change."""
    data = config.data
    key = repr((config.model, config.objective, config.image_size, data.channels, data.views, config.run.seed))
    if key not in _built:
        while len(_built) >= _KEPT_MODULES:
            del _built[next(iter(_built))]
        with torch.device("meta"):
            _built[key] = build(config)
    return _built[key]


def views_of(config: Config, images: int) -> list[tuple[int, int]]:
    """(views in all, side in pixels) of every resolution, for `images` images."""
    views = config.data.views
    return [(group.count * images, group.size) for group in (views.global_, views.local) if group.count]


def linear(module: nn.Module | None) -> int:
    """FLOPs of one row through every linear layer of a module, forward."""
    layers = module.modules() if module is not None else ()
    return sum(2 * layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))


def _packed_encoder(encoder: Encoder, groups: list[tuple[int, int]]) -> dict[str, int]:
    packing = encoder.packing(groups)
    parts = dict.fromkeys(("attention", "attention_linear", "mlp", "whole_encoder"), 0)
    for block in encoder.blocks:
        assert isinstance(block, PackedBlock)
        branch = block.kept(packing)
        of_attention = linear(block.attn)
        parts["attention"] += 4 * branch.pairs * block.attn.num_heads * block.attn.head_dim
        parts["attention_linear"] += branch.tokens * of_attention
        parts["mlp"] += branch.tokens * (linear(block) - of_attention)
    parts = {name: _FORWARD_AND_BACKWARD * part for name, part in parts.items()}
    outside = {"patch_embedding": _patches, "positions": _positions}
    parts |= {name: of_groups(encoder, groups) for name, of_groups in outside.items()}
    return parts | {"pooling": _pooling(encoder, packing)}


def _patches(encoder: Encoder, groups: list[tuple[int, int]]) -> int:
    """Twice the forward pass: no gradient with respect to pixels."""
    embed = encoder.backbone.patch_embed
    if type(embed) is PatchEmbed:
        tokens = sum(n * prod(embed.dynamic_feat_size((size, size))) for n, size in groups)
        return 2 * 2 * tokens * embed.proj.weight.numel()
    return _FORWARD_AND_BACKWARD * _counted(
        embed, [(n, encoder.channels, size, size) for n, size in groups]
    )  # a stem of several layers


def _positions(encoder: Encoder, groups: list[tuple[int, int]]) -> int:
    """Twice the forward pass, for the matrix is constant."""
    backbone = encoder.backbone
    old = tuple(backbone.patch_embed.grid_size or ())
    grids = [tuple(backbone.patch_embed.dynamic_feat_size((size, size))) for _, size in groups]
    if backbone.pos_embed is None:
        return 0
    return 2 * 2 * sum(prod(new) * prod(old) * backbone.embed_dim for new in grids if new != old)


def _pooling(encoder: Encoder, packing: Packing) -> int:
    """timm's head: attention pooling where a model has it, and the layer of `model.head_dim`."""
    backbone = encoder.backbone
    head = _FORWARD_AND_BACKWARD * sum(n for n, _ in packing.groups) * linear(backbone.head)
    if getattr(backbone, "attn_pool", None) is None:
        return head
    prefix = 0 if getattr(backbone, "pool_include_prefix", True) else backbone.num_prefix_tokens
    shapes = [(n, length - prefix, backbone.embed_dim) for n, length in packing.groups]
    return head + _FORWARD_AND_BACKWARD * _counted(backbone.attn_pool, shapes)


def _whole_encoder(encoder: Encoder, groups: list[tuple[int, int]]) -> dict[str, int]:
    parts = dict.fromkeys(("patch_embedding", "positions", "attention", "attention_linear", "mlp", "pooling"), 0)
    forward = _counted(encoder.eval().backbone, [(n, encoder.channels, size, size) for n, size in groups])
    return parts | {"whole_encoder": _FORWARD_AND_BACKWARD * forward}


def _counted(module: nn.Module, shapes: Sequence[tuple[int, ...]]) -> int:
    """FLOPs of a forward pass over inputs of these shapes, by torch's counter on the meta device."""
    with FlopCounterMode(display=False) as counter:
        for shape in shapes:
            module(torch.empty(shape, device="meta"))
    return int(counter.get_total_flops())


def _regularizer(regularizer: Regularizer, sequences: int, config: Config) -> int:
    """Products of embeddings with random directions, which need no gradient; and the covariance of Weak-SIGReg."""
    width = config.model.projector.dim
    if isinstance(regularizer, SIGReg | VISReg):
        return 2 * 2 * sequences * width * regularizer.num_slices
    assert isinstance(regularizer, WeakSIGReg)
    sketch, views = min(width, regularizer.sketch), config.data.views
    statistics = 1 if regularizer.joint else views.global_.count + views.local.count
    projections = 2 * 2 * sequences * width * sketch if width > sketch else 0
    return projections + _FORWARD_AND_BACKWARD * 2 * (sequences + statistics) * sketch**2


def _blocks(parts: dict[str, int]) -> int:
    return parts["attention"] + parts["attention_linear"] + parts["mlp"]


def _tokens_processed(encoder: Encoder, packing: Packing) -> float:
    if not encoder.packed:
        return 0.0
    kept = [block.kept(packing).tokens for block in encoder.blocks if isinstance(block, PackedBlock)]
    return sum(kept) / len(kept)
