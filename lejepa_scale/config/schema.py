"""Every key of a run: names, types, defaults, and the checks that need no machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

EngineName = Literal["single", "ddp", "fsdp", "zero1", "zero2", "zero3"]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A strict group of keys: an unknown one is refused. Python writes `global_` and `lambda_`, a file does not."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_by_name=True, validate_by_alias=True
    )


class Run(Section):
    dir: Path = Field(description="run directory: config.yaml, metrics.jsonl, checkpoints/")
    seed: NonNegative = Field(0, description="initial weights, sample order, augmentation, slices")


class Train(Section):
    steps: Positive = Field(description="optimizer steps of the whole run")
    global_batch: Positive = Field(description="images per optimizer step over all ranks")
    micro_batch: Positive | None = Field(
        None, description="images per rank and forward pass; unset: global_batch / ranks"
    )
    max_nonfinite: Positive = Field(20, description="stop after this many non-finite steps in a row")


class Engine(Section):
    name: EngineName = Field("ddp", description="how parameters and gradients are laid out over ranks")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="compute precision; parameters stay fp32")
    shard_degree: Positive | None = Field(
        None, description="fsdp: ranks a parameter is sharded over, replicated beyond (HSDP); unset: all"
    )
    prefetch: NonNegative = Field(
        1, description="fsdp, zero3: blocks whose parameters are gathered ahead of their turn"
    )
    cpu_offload: bool = Field(
        False, description="fsdp, zero: optimizer states and sharded parameters live in host memory"
    )
    compile: bool = Field(False, description="torch.compile for each block, with fixed shapes")
    fp8: bool = Field(
        False, description="single, ddp, fsdp: the blocks' linear layers in float8 (torchao), on chips that have it"
    )
    activation_checkpointing: Literal["none", "full", "selective", "budget"] = Field(
        "none",
        description="what the backward pass computes again: nothing; whole blocks (full); all but matrix products and "
        "attention (selective); what compile chooses to stay within activation_budget (budget)",
    )
    activation_budget: float = Field(
        0.5, gt=0, le=1, description="budget: share of the activations of compiled blocks that may be kept"
    )
    timeout_minutes: Positive = Field(10, description="how long a collective may wait for a lost rank")


class Source(Section):
    shards: list[str] = Field(description="tar shards: paths or URLs, braces allowed")
    weight: float = Field(1.0, gt=0, description="share of the samples drawn from this source")

    @field_validator("shards", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class ViewGroup(Section):
    count: NonNegative = Field(description="views per image")
    size: Positive = Field(description="side in pixels")
    scale: tuple[float, float] = Field(description="crop area as a fraction of the image: [low, high]")

    @model_validator(mode="after")
    def _scale_is_an_interval(self) -> ViewGroup:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"scale must satisfy 0 < low <= high <= 1, got [{low}, {high}]")
        return self


class Views(Section):
    global_: ViewGroup = Field(ViewGroup(count=2, size=224, scale=(0.3, 1.0)), alias="global")
    local: ViewGroup = Field(ViewGroup(count=6, size=98, scale=(0.05, 0.3)))

    @model_validator(mode="after")
    def _a_target_exists(self) -> Views:
        if self.global_.count < 1:
            raise ValueError("global.count must be at least 1: the global views' mean is what every view predicts")
        if self.global_.count + self.local.count < 2:
            raise ValueError("at least two views are needed in all: with one, the prediction loss is always zero")
        return self


class Augment(Section):
    """Photometric defaults are those of LeJEPA (arXiv 2511.08544, experiments)."""

    flip: Probability = 0.5
    jitter: Probability = Field(0.8, description="probability of colour jitter")
    brightness: float = Field(0.4, ge=0)
    contrast: float = Field(0.4, ge=0)
    saturation: float = Field(0.2, ge=0)
    hue: float = Field(0.1, ge=0, le=0.5)
    grayscale: Probability = 0.2
    blur: Probability = Field(0.5, description="probability of Gaussian blur, sigma in [0.1, 2]")
    solarize: Probability = Field(0.2, description="probability of inverting values >= 128")


class Data(Section):
    shards: list[Source] = Field(
        min_length=1, description="tar shards: path or URL with braces, a list, or a mixture [{shards, weight}, ...]"
    )
    workers: NonNegative = Field(0, description="decoding processes per rank; 0: in the training process")
    prefetch: Positive = Field(2, description="batches each worker prepares ahead")
    shuffle_block: Positive = Field(
        16384, description="samples mixed among each other, shards being in random order; any size, no memory"
    )
    index_dir: Path | None = Field(
        None, description="where indexes are written; unset: beside the shards, else in the user's cache"
    )
    cache_dir: Path | None = Field(
        None, description="a disk of the node for whole copies of remote shards; unset: samples come by range request"
    )
    cache_gb: float | None = Field(None, gt=0, description="size of that cache in 10^9 bytes; unset: no limit")
    read_timeout: float = Field(30.0, gt=0, description="seconds for up to 4 MiB of a remote shard")
    retries: NonNegative = Field(5, description="failures in a row before a remote shard stops the run")
    max_pixels: Positive = Field(
        80_000_000,
        le=178_000_000,
        description="larger images are faults; read from the header (Pillow's own limit: 178e6)",
    )
    max_faults: Positive = Field(16, description="stop after this many samples in a row that cannot be used")
    log_keys: bool = Field(False, description="write which samples every rank consumed to keys/ in the run directory")
    views: Views = Views()
    augment: Augment = Augment()

    @field_validator("shards", mode="before")
    @classmethod
    def _as_mixture(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [{"shards": value}]
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            return [{"shards": value}]
        return value


class Projector(Section):
    hidden: Positive = 2048
    layers: Positive = Field(3, description="linear layers; batch normalization and GELU between them")
    dim: Positive = Field(64, description="width of the embeddings that the objective sees")


class Predictor(Section):
    hidden: Positive = 512


class Model(Section):
    encoder: str = Field(description="a timm model name, or a size of ours: vit_nano, vit_micro")
    image_size: Positive | None = Field(None, description="position-embedding grid in pixels; unset: global view size")
    patch_size: Positive | None = Field(None, description="unset: what the encoder's name says")
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth of the last block, or of all")
    drop_path_uniform: bool = Field(
        False, description="every block drops at that rate; unset: rates grow linearly from 0 at the first block"
    )
    attention: Literal["auto", "sdpa", "xformers", "varlen"] = Field(
        "auto", description="packed attention backend; auto: the first that passes a forward and backward probe"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="further arguments for the timm model")
    projector: Projector = Projector()
    predictor: Predictor | None = Field(None, description="JEPA predictor after the projector; off by default")


class Objective(Section):
    regularizer: Literal["sigreg", "weak_sigreg"] = Field(
        "sigreg", description="what keeps the embeddings apart; weak_sigreg: second moments alone"
    )
    lambda_: float = Field(0.05, alias="lambda", gt=0, lt=1, description="weight of the regularizer against prediction")
    weighting: Literal["convex", "additive"] = Field(
        "convex", description="convex: (1 - lambda) prediction + lambda regularizer; additive: prediction at weight 1"
    )
    prediction: Literal["mean", "sum"] = Field("mean", description="reduction of the squared error over dimensions")
    joint: bool = Field(False, description="one statistic over the views' pooled embeddings, not one per view")
    scale_centre: float = Field(
        0.0, ge=0, description="weight of VISReg's scale and centre terms beside the regularizer"
    )
    num_slices: Positive = Field(1024, description="random directions per step")
    knots: Annotated[int, Field(ge=2)] = Field(17, description="quadrature points on [0, t_max]")
    t_max: float = Field(3.0, gt=0)
    estimator: Literal["v", "u"] = Field("v", description="v: Epps-Pulley as published; u: unbiased")
    scale: Literal["n", "reference", "none"] = Field(
        "n", description="factor before the statistic: samples, reference_n, or 1"
    )
    reference_n: Positive = Field(256, description="samples that scale=reference stands for")
    accumulation: Literal["micro", "unbiased", "exact"] = Field(
        "micro",
        description="where a step has several micro-batches: the objective of each (micro); the same, unbiased for that of "
        "the whole batch (unbiased, with estimator=u); or the whole batch's own, at one more forward pass (exact)",
    )
    sketch: Positive = Field(64, description="weak_sigreg: directions of its covariance")
    communication: Literal["auto", "sums", "embeddings", "distinct"] = Field(
        "auto", description="how ranks meet in SIGReg; all give the same value, auto is the cheapest"
    )
    backend: Literal["auto", "reference", "fused", "native", "triton"] = Field(
        "auto", description="SIGReg's arithmetic; all give the same value"
    )


class Optim(Section):
    lr: float = Field(5e-4, gt=0)
    final_lr_ratio: float = Field(1e-3, ge=0, le=1, description="last learning rate / lr")
    warmup_steps: NonNegative = 0
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    clip_norm: float | None = Field(None, gt=0, description="global gradient norm limit; unset: no clipping")


class Checkpoint(Section):
    every: Positive = Field(1000, description="steps between checkpoints; the last step is always saved")
    keep: Positive = Field(2, description="newest checkpoints kept")


class Wandb(Section):
    enabled: bool = False
    project: str = "lejepa_scale"
    name: str | None = None


class Log(Section):
    every: Positive = Field(10, description="steps between lines of metrics.jsonl")
    wandb: Wandb = Wandb()


class Probe(Section):
    enabled: bool = Field(True, description="online linear probe on detached features, where shards hold labels")
    lr: float = Field(1e-3, gt=0)


class Config(Section):
    run: Run
    train: Train
    data: Data
    model: Model
    engine: Engine = Engine()
    objective: Objective = Objective()
    optim: Optim = Optim()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    probe: Probe = Probe()

    @model_validator(mode="after")
    def _parts_fit(self) -> Config:
        if self.optim.warmup_steps > self.train.steps:
            raise ValueError(f"optim.warmup_steps = {self.optim.warmup_steps} exceeds train.steps = {self.train.steps}")
        if self.engine.shard_degree is not None and self.engine.name != "fsdp":
            raise ValueError(f"engine.shard_degree is for engine.name=fsdp, not {self.engine.name}")
        engine = self.engine
        if engine.activation_checkpointing == "budget" and not engine.compile:
            raise ValueError("engine.activation_checkpointing=budget is torch.compile's: set engine.compile=true too")
        if engine.cpu_offload and engine.name not in ("fsdp", "zero1", "zero2", "zero3"):
            raise ValueError(f"engine.cpu_offload is for fsdp and zero1/2/3, not {engine.name}")
        if engine.fp8 and engine.name.startswith("zero"):
            raise ValueError(f"engine.fp8 is for single, ddp and fsdp, not {engine.name}")
        if engine.fp8 and engine.precision != "bf16":
            raise ValueError("engine.fp8 needs engine.precision=bf16, in which everything else is computed")
        data = self.data
        longest = 2 * (data.retries + 1) * data.read_timeout + 30 * data.retries
        if longest > 60 * self.engine.timeout_minutes:
            raise ValueError(
                f"data.retries = {data.retries} and data.read_timeout = {data.read_timeout:g} can keep a rank waiting for "
                f"{longest / 60:.1f} minutes, longer than the others wait for it: engine.timeout_minutes = "
                f"{self.engine.timeout_minutes}"
            )
        objective = self.objective
        if objective.accumulation == "unbiased" and (objective.regularizer, objective.estimator) != ("sigreg", "u"):
            raise ValueError(
                "objective.accumulation=unbiased needs objective.regularizer=sigreg and objective.estimator=u, not "
                f"{objective.regularizer} and {objective.estimator}"
            )
        return self

    @property
    def image_size(self) -> int:
        """Side in pixels at which the encoder is built and evaluated."""
        return self.model.image_size or self.data.views.global_.size
