"""The encoder, what it begins with, and the heads that train it."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator

from lejepa_scale.config.schema.section import Positive, Section


class Projector(Section):
    """Perceptron from the encoder's features to the embeddings; used in training alone."""

    hidden: Positive = Field(2048, description="width between the linear layers")
    layers: Positive = Field(3, description="linear layers; batch normalization and an activation between them")
    activation: Literal["gelu", "relu"] = Field("gelu", description="what follows each batch normalization")
    dim: Positive = Field(64, description="width of the embeddings that the objective sees")


class Predictor(Section):
    """Two linear layers; any key of it switches it on, `model.predictor={}` too."""

    hidden: Positive = Field(512, description="width between its two linear layers")


class InitFrom(Section):
    """Weights that the encoder of a new run begins with. A run that has a checkpoint goes on from that."""

    source: Annotated[str, AfterValidator(os.path.expanduser)] = Field(
        min_length=1,
        description="a file or folder of weights, a run or checkpoint of ours, or `timm:NAME.TAG` as timm has released it",
    )
    key: str | None = Field(
        None, description="which of a file's sets of weights, where several fit: teacher, model_ema"
    )
    prefix: str | None = Field(None, description="what the encoder's names begin with in the source; unset: found out")
    leave_out: list[str] = Field(
        [],
        description="names, parts before a dot or patterns with *: not read, and left at random where the encoder has them",
    )

    @field_validator("leave_out", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class PatchDrop(Section):
    """Shares of an image's patches that training leaves out before the blocks, drawn anew for every view: fewer tokens, less
    time and memory, and views that show less. int(patches x (1 - share)) stay, one at least; class and register tokens
    always do. Vision transformers alone; evaluation and exports see all patches."""

    global_: float = Field(0.0, ge=0, lt=1, alias="global", description="of a global view's patches; 0: all stay")
    local: float = Field(0.0, ge=0, lt=1, description="of a local view's patches; 0: all stay")


class Model(Section):
    """The encoder and the heads that train it."""

    encoder: str = Field(description="a timm model name, or a size of ours: vit_nano, vit_micro")
    image_size: Positive | None = Field(None, description="position-embedding grid in pixels; unset: global view size")
    patch_size: Positive | None = Field(
        None, description="side of a token in pixels; unset: what the encoder's name says"
    )
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth of the last block, or of all")
    drop_path_uniform: bool = Field(
        False, description="every block drops at that rate; false: rates grow linearly from 0 at the first block"
    )
    patch_drop: PatchDrop = Field(PatchDrop(), description="patches that training leaves out")
    attention: Literal["auto", "sdpa", "xformers", "varlen"] = Field(
        "auto", description="packed attention backend; auto: the fastest of those that run and agree with sdpa"
    )
    head_dim: Positive | None = Field(
        None,
        description="width of a linear layer after the pooling (timm's classifier), whose output is the feature; or none",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="further arguments for the timm model")
    init_from: InitFrom | None = Field(
        None, description="weights that the encoder of a new run begins with: a source, or a section; unset: random"
    )
    projector: Projector = Field(Projector(), description="head whose output the objective sees")
    predictor: Predictor | None = Field(None, description="JEPA predictor after the projector; off by default")

    @field_validator("init_from", mode="before")
    @classmethod
    def _as_section(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value
