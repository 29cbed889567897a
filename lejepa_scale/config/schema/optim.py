"""How it is minimized."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lejepa_scale.config.schema.section import Duration, DurationOrZero, Section


class Muon(Section):
    """Muon: steps along the orthogonal factor of each matrix's momentum, by five Newton-Schulz iterations."""

    momentum: float = Field(
        0.95, ge=0, lt=1, description="share that the average of gradients keeps in a step (Nesterov)"
    )
    adjust_lr: Literal["match_rms_adamw", "original"] = Field(
        "match_rms_adamw",
        description="factor of the learning rate for a matrix of a x b. match_rms_adamw: 0.2 sqrt(max(a, b)), so that lr "
        "and weight_decay can be AdamW's (arXiv 2502.16982); original: sqrt(max(1, a / b)), for rates as 0.02, by lr_ratio",
    )
    lr_ratio: float = Field(1.0, gt=0, description="Muon's learning rate / lr, at every step")


class Optim(Section):
    """AdamW, or Muon beside it, and the learning rate over the steps: a linear warm-up, then a cosine, or flat with a
    cooldown at the end."""

    name: Literal["adamw", "muon"] = Field(
        "adamw",
        description="muon: the matrices of the encoder's blocks, convolutions too, are updated by Muon, all else by AdamW "
        "at the same schedule; single, ddp, fsdp",
    )
    muon: Muon = Field(Muon(), description="settings of name=muon")
    lr: float = Field(5e-4, gt=0, description="highest learning rate, at the end of the warm-up")
    final_lr_ratio: float = Field(1e-3, ge=0, le=1, description="last learning rate / lr")
    schedule: Literal["cosine", "wsd"] = Field(
        "cosine",
        description="after the warm-up. cosine: down to the last step. wsd: constant, then down over cooldown_steps, so "
        "that a checkpoint before these can be gone on from with more train.steps",
    )
    cooldown_steps: Duration | None = Field(
        None, description="wsd: steps at the end in which the learning rate falls; unset: a fifth of train.steps"
    )
    warmup_steps: DurationOrZero = Field(0, description="steps over which the learning rate grows")
    warmup_start_ratio: float | None = Field(
        None, ge=0, le=1, description="first learning rate / lr; unset: 1 / warmup_steps"
    )
    layer_decay: float | None = Field(
        None,
        gt=0,
        le=1,
        description="factor of the learning rate from each of the encoder's layers to the one before it, from 1 in the "
        "projector down, by timm's groups; 0.75, say, spares weights that the run begins with. Unset or 1: one rate for all",
    )
    weight_decay: float = Field(
        0.05, ge=0, description="decoupled. The paper's: 0.05 for transformers, 5e-4 for ResNets"
    )
    final_weight_decay: float | None = Field(
        None, ge=0, description="weight decay of the last step, towards which it moves by a cosine; unset: constant"
    )
    decay: Literal["weights", "all"] = Field(
        "weights",
        description="what it shrinks. weights: those of linear maps and convolutions, without what the encoder excepts "
        "(biases, norms, scales, tokens, positions); all: every parameter, as in the published minimal recipe",
    )
    betas: tuple[float, float] = Field((0.9, 0.95), description="decay of AdamW's two moments")
    eps: float = Field(1e-8, gt=0, description="AdamW's addend to the root of the second moment")
    clip_norm: float | None = Field(None, gt=0, description="global gradient norm limit; unset: no clipping")
