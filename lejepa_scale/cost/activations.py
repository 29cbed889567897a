"""What autograd keeps of a forward pass until the backward pass, by formula: bytes per token, module by module, in eager
mode. Compiled blocks keep less, since the compiler computes elementwise work again: there this is an upper bound."""

from __future__ import annotations

from typing import NamedTuple

import torch
from timm.layers import GluMlp, SwiGLU
from torch import Tensor, nn

from lejepa_scale.config import BatchPlan, Config
from lejepa_scale.cost.flops import views_of
from lejepa_scale.model import Encoder, LeJEPA
from lejepa_scale.model.attention import Packing
from lejepa_scale.model.packed import PackedBlock
from lejepa_scale.objective import SIGReg, VISReg
from lejepa_scale.objective.visreg import most_in_flight

_FP32 = 4
_STATISTICS = 2 * _FP32  # mean and inverse deviation of a normalized row


def bytes_of_number(config: Config) -> int:
    """Of an element of what layers compute, of the residual stream, and of what is normalized."""
    return 2 if config.engine.precision == "bf16" else _FP32


class Activations(NamedTuple):
    """Bytes, of one micro-batch on one rank."""

    kept: float  # at the end of the forward pass, for the backward pass
    peak: float  # the most that there is at once, kept or in flight, in either pass


def activations(config: Config, plan: BatchPlan, model: LeJEPA, packed_kernel: bool) -> Activations:
    """Of one micro-batch of `plan`; model on the meta device. packed_kernel: attention reads and writes the packed row
    (xformers, varlen); else it is called for each resolution and a copy joins the outputs."""
    encoder, groups, size = model.encoder, views_of(config, plan.micro_batch), bytes_of_number(config)
    kind = config.engine.activation_checkpointing
    rows = sum(n for n, _ in groups) * (plan.accumulation if config.objective.accumulation == "exact" else 1)
    heads = _heads(config, model, rows, rows * plan.ranks, size)
    objective = _objective_in_flight(config, model, rows, rows * plan.ranks)
    if not encoder.packed:
        whole = _saved(encoder, groups) * size / _FP32
        # with `full` timm recomputes group by group of layers; the largest is taken for half of all
        kept = heads if kind == "full" else heads + whole
        return Activations(kept, max(kept + objective, 0.5 * whole if kind == "full" else 1.1 * whole))
    packing, width = encoder.packing(groups), encoder.backbone.embed_dim
    before, after = _around(encoder, packing, size)
    rotates = getattr(encoder.backbone, "rope", None) is not None
    angles = _angles(encoder) if rotates and any(encoder.patch_drop[: len(groups)]) else 0
    kept, peak = before, 0.0
    for block in encoder.blocks:
        assert isinstance(block, PackedBlock)
        branch, entering = block.kept(packing), packing.tokens * width * size
        of_token = _attention(block, width, rotates, packed_kernel, size) + angles + _mlp(block, width, size)
        everything = branch.tokens * of_token
        of_block = {
            "none": everything,
            "full": entering,
            "selective": entering + branch.tokens * _products(block, size),
            "budget": entering + config.engine.activation_budget * (everything - entering),
        }[kind]
        kept += of_block
        again = 0.0 if kind == "none" else everything - (of_block - entering)
        # a thinned branch is added to a copy of the row
        forward = (2 if branch != packing else 1) * entering + branch.tokens * width * size
        peak = max(peak, kept + forward, kept + again + _gradients(block, width, packing, branch, size))
    kept += after + heads
    return Activations(kept, max(peak, kept + objective))


def _attention(block: PackedBlock, width: int, rotates: bool, packed_kernel: bool, size: int) -> float:
    """Bytes per token of a block's attention branch."""
    attn = block.attn
    inner = attn.num_heads * attn.head_dim * size
    normalized = not isinstance(attn.q_norm, nn.Identity)
    kept = _normalized(width, size) + 3 * inner  # queries, keys and values
    if attn.qkv is not None and (normalized or rotates):
        kept += 2 * inner  # changed queries and keys, while the one tensor that all three came in stays for the values
    if normalized:
        own = attn.qkv is None  # their input is not a part of that tensor
        kept += 2 * own * attn.num_heads * attn.head_dim * size + 2 * attn.num_heads * _STATISTICS
    kept += inner * (1 if packed_kernel else 2) + attn.num_heads * _FP32  # outputs; logarithms of the softmax's sums
    if not isinstance(attn.norm, nn.Identity):
        kept += _inner_norm(attn.num_heads * attn.head_dim, size)
    return kept + _scaled(block, width, size)


def _angles(encoder: Encoder) -> int:
    """Sines and cosines of a token, in every block, where sequences have lost patches and share no table."""
    attn = encoder.backbone.blocks[0].attn
    return 2 * attn.head_dim * _FP32 * (attn.num_heads if encoder.backbone.rope_mixed else 1)


def _mlp(block: PackedBlock, width: int, size: int) -> float:
    """Bytes per token of a block's MLP branch."""
    hidden = _hidden(block)
    kept = _normalized(width, size) + hidden * size * (4 if _gated(block) else 2)
    if not isinstance(getattr(block.mlp, "norm", nn.Identity()), nn.Identity):
        kept += _inner_norm(hidden, size)
    return kept + _scaled(block, width, size)


def _gated(block: PackedBlock) -> bool:
    """Whether gate, value, activation and product are kept, not only the activation's input and output."""
    return isinstance(block.mlp, GluMlp | SwiGLU)


def _hidden(block: PackedBlock) -> int:
    return max(layer.in_features for layer in block.mlp.modules() if isinstance(layer, nn.Linear))


def _normalized(width: int, size: int) -> int:
    """What a normalization keeps, and its output, which the next linear layer keeps."""
    return 2 * width * size + _STATISTICS


def _inner_norm(width: int, size: int) -> int:
    """A normalization inside a branch, whose input is kept in any case."""
    return width * size + _STATISTICS


def _scaled(block: PackedBlock, width: int, size: int) -> int:
    """The input of layer scale."""
    scaled = getattr(block, "gamma_1", None) is not None or list(getattr(block, "ls1", nn.Identity()).parameters())
    return width * size if scaled else 0


def _products(block: PackedBlock, size: int) -> int:
    """Outputs of linear layers and of attention, per token: what selective checkpointing keeps."""
    attn = block.attn
    linear = sum(layer.out_features for layer in block.modules() if isinstance(layer, nn.Linear))
    return (linear + attn.num_heads * attn.head_dim) * size + attn.num_heads * _FP32


def _gradients(block: PackedBlock, width: int, packing: Packing, branch: Packing, size: int) -> float:
    """Gradients in flight: of the residual stream, and of the wider branch's inner activations."""
    inner = block.attn.num_heads * block.attn.head_dim
    wide = max(4 * inner, (2 if _gated(block) else 1) * _hidden(block))
    return packing.tokens * width * size + branch.tokens * wide * size


def _around(encoder: Encoder, packing: Packing, size: int) -> tuple[float, float]:
    """Before the blocks, and after them: normalizations, and a pooling head."""
    width, backbone = encoder.backbone.embed_dim, encoder.backbone
    before, after = (
        0 if isinstance(norm, nn.Identity) else packing.tokens * (width * size + _STATISTICS)
        for norm in (backbone.norm_pre, backbone.norm)
    )
    if getattr(backbone, "attn_pool", None) is not None:
        after += packing.tokens * 3 * width * size  # its input, keys and values
    return before, after


def _heads(config: Config, model: LeJEPA, rows: int, rows_of_all: int, size: int) -> float:
    """Projector, predictor and objective, for `rows` views; those of all ranks are what VISReg gathers."""
    head, predictor, objective = config.model.projector, config.model.predictor, config.objective
    # batch normalization keeps its input in fp32, GELU its input (ReLU its output), the next linear layer that output
    kept = rows * model.encoder.embed_dim * size
    if model.encoder.packed and config.model.head_dim:
        kept += rows * model.encoder.backbone.num_features * size  # what the head is applied to
    kept += rows * (head.layers - 1) * head.hidden * (_FP32 + (2 if head.activation == "gelu" else 1) * size)
    if predictor is not None:
        kept += rows * (head.dim + 2 * predictor.hidden) * size
    kept += rows * head.dim * (2 * _FP32 if size == 2 else _FP32)  # embeddings in fp32, and their distances
    regularizer = model.loss.regularizer
    if isinstance(regularizer, SIGReg):
        every_knot = regularizer.knots - 1 if regularizer.backend == "reference" else 1
        views = 1 if regularizer.joint else config.data.views.global_.count + config.data.views.local.count
        kept += _FP32 * regularizer.num_slices * (rows * every_knot + head.dim + 8 * (regularizer.knots - 1) * views)
    elif isinstance(regularizer, VISReg):
        kept += _FP32 * rows_of_all * head.dim  # the gradient, which the forward pass has made
    else:
        kept += _FP32 * rows * (head.dim + objective.weak_sigreg.sketch)
    if model.loss.scale_centre:
        kept += _FP32 * rows * head.dim
    return kept


def _objective_in_flight(config: Config, model: LeJEPA, rows: int, rows_of_all: int) -> float:
    regularizer = model.loss.regularizer
    if isinstance(regularizer, VISReg):
        return most_in_flight(rows_of_all, regularizer.num_slices / (rows_of_all // rows), config.model.projector.dim)
    return rows * config.objective.sigreg.num_slices * _FP32  # gradients of SIGReg's projections


def _saved(encoder: Encoder, groups: list[tuple[int, int]]) -> int:
    """Bytes that autograd keeps of a model that is not packed, in fp32: its forward pass on the meta device."""
    held: dict[int, Tensor] = {}
    parameters = {p.untyped_storage()._cdata for p in encoder.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        held.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for n, size in groups:
            encoder.train().backbone(torch.empty(n, encoder.channels, size, size, device="meta"))
    return sum(tensor.untyped_storage().nbytes() for key, tensor in held.items() if key not in parameters)
