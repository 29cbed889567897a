"""Every key of a run: names, types, defaults and what each is for. Refuses what one key alone can tell to be wrong; what
several keys together make wrong is in checks.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    WrapValidator,
    field_validator,
    model_validator,
)

from lejepa_scale.addresses import Address, is_remote
from lejepa_scale.config import checks
from lejepa_scale.config.words import steps_alone, steps_or_words

EngineName = Literal["single", "ddp", "fsdp", "zero1", "zero2", "zero3"]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
# An int of steps, or words (a str) that durations.in_steps makes steps of once the data is opened: what reads it sees steps.
_AsItIs = PlainSerializer(lambda value: value, return_type=int | str | None)
Duration = Annotated[Positive, WrapValidator(steps_or_words), _AsItIs]
DurationOrZero = Annotated[NonNegative, WrapValidator(steps_or_words), _AsItIs]
FilePath = Annotated[Path, AfterValidator(Path.expanduser)]  # `~` is the home folder, which a shell leaves in key=~/a


class Section(BaseModel):
    """A strict group of keys: an unknown one is refused. Python writes `global_` and `lambda_`, a file does not."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_by_name=True, validate_by_alias=True
    )


class Run(Section):
    """Where a run lives, and what its random numbers begin with."""

    dir: FilePath = Field(description="run directory: config.yaml, metrics.jsonl, checkpoints/")
    license: str | None = Field(
        None, description="of the weights, as model cards have it: apache-2.0, cc-by-nc-4.0; unset: none is named"
    )
    resume: str = Field(
        "auto",
        description="auto: go on from the run's newest sound checkpoint, or begin. never: begin, and move what is there "
        "aside. A path: begin from that checkpoint, or that run's newest, where this run has none of its own",
    )
    seed: NonNegative = Field(0, description="initial weights, sample order, augmentation, slices")
    max_hours: float | None = Field(
        None, gt=0, description="stop, saved, after so many hours of one start; unset: no limit"
    )


class Train(Section):
    """Length and batch: global_batch = micro_batch x ranks x accumulation. One of steps, epochs and images says how long a
    run is; where an override names one, what the file says of the others is left out."""

    # None until durations.in_steps has set it, where it is in other units.
    steps: Annotated[Positive, WrapValidator(steps_alone), _AsItIs] = Field(  # type: ignore[assignment]
        None, description="optimizer steps of the whole run"
    )
    epochs: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="passes over the data, 0.5 or 100, in place of steps: that many times the samples of data.shards (of a "
        "mixture: of all sources together, whatever their weights) / global_batch, rounded down",
    )
    images: Positive | None = Field(
        None, description="images seen, in place of steps: / global_batch, rounded down to whole steps"
    )
    global_batch: Positive = Field(description="images per optimizer step over all ranks")
    micro_batch: Positive | None = Field(
        None, description="images per rank and forward pass; unset: global_batch / ranks"
    )
    max_nonfinite: Positive = Field(20, description="stop after this many non-finite steps in a row")
    skip_samples: list[str] = Field(
        [],
        description="samples to leave out, SHARD.tar/KEY as nonfinite.jsonl names them: the next one of the shard comes in "
        "the place of each; the order of all others stays",
    )

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        given = {name: value for name in ("steps", "epochs", "images") if (value := getattr(self, name)) is not None}
        if not given:
            raise ValueError("nothing says how long the run is. Give train.steps, train.epochs or train.images")
        if len(given) > 1:
            several = " and ".join(f"train.{name} = {value}" for name, value in given.items())
            raise ValueError(
                f"{several} all say how long the run is. Keep one, and leave out the others or set them to null"
            )
        return self


class Engine(Section):
    """How a step is computed. Nothing here changes what is optimized, but for rounding."""

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
    fp8: bool = Field(False, description="the blocks' linear layers in float8 (torchao), on chips that have it")
    fp8_recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = Field(
        "tensorwise",
        description="fp8: a scale for each tensor; for each row and column, which rounds gradients less; or that with the "
        "weights' gradients in bf16",
    )
    activation_checkpointing: Literal["none", "full", "selective", "budget"] = Field(
        "none",
        description="what the backward pass computes again: nothing; whole blocks (full); all but matrix products and "
        "attention (selective); what compile chooses to stay within activation_budget (budget)",
    )
    activation_budget: float = Field(
        0.5, gt=0, le=1, description="budget: share of the activations of compiled blocks that may be kept"
    )
    timeout_minutes: float = Field(
        10.0,
        gt=0,
        description="after which a rank counts as lost: one that a collective waits for, or without a sign of life while it "
        "indexes, reads or writes, which may take any time",
    )


CheckpointDir = Annotated[
    str, AfterValidator(os.path.expanduser), AfterValidator(Address), PlainSerializer(str, return_type=str)
]
Interval = tuple[float, float]


Shards = Annotated[str, AfterValidator(Address), PlainSerializer(str, return_type=str)]  # written without secrets


class Source(Section):
    """One source of a mixture."""

    shards: list[Shards] = Field(description="tar shards: paths or URLs, braces allowed")
    weight: float = Field(1.0, gt=0, description="share of the samples drawn from this source")
    image_key: str = Field(
        "",
        pattern=r"^[^/:]*$",
        description="ending of the member that is the image, several by preference as left.jpg;left.png; empty: any image's",
    )
    label_key: str = Field(
        "cls",
        pattern=r"^[^/:;]+(:[^/:;]+)?$",
        description="ending of the member that is the label, a number or a name; with a path, as json:category.id, in JSON",
    )
    range: Interval | list[Interval] | None = Field(
        None,
        description="[low, high] of the stored values, or a list with that of each channel; unset: 8-bit images",
    )

    @field_validator("shards", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _range_is_an_interval(self) -> Source:
        for low, high in self.ranges or ():
            if not low < high:
                raise ValueError(f"range must satisfy low < high, got [{low:g}, {high:g}]")
        return self

    @property
    def ranges(self) -> tuple[Interval, ...] | None:
        """One interval, or one of each channel."""
        if self.range is None or isinstance(self.range, list):
            return None if self.range is None else tuple(self.range)
        return (self.range,)


class ViewGroup(Section):
    """Views of one size. Each key may be given alone; the others keep the group's defaults."""

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
    """Random crops of every image. The mean of the global views is what every view predicts."""

    global_: ViewGroup = Field(
        ViewGroup(count=2, size=224, scale=(0.3, 1.0)), alias="global", description="large crops, at least one"
    )
    local: ViewGroup = Field(ViewGroup(count=6, size=98, scale=(0.05, 0.3)), description="small crops, or none")

    @field_validator("global_", "local", mode="before")
    @classmethod
    def _over_the_default(cls, value: Any, info: ValidationInfo) -> Any:
        """What a file leaves out of a group is the group's own default, which ViewGroup alone does not know."""
        if not isinstance(value, dict):
            return value
        default: ViewGroup = cls.model_fields[str(info.field_name)].default
        return {**default.model_dump(), **value}

    @model_validator(mode="after")
    def _a_target_exists(self) -> Views:
        if self.global_.count < 1:
            raise ValueError("global.count must be at least 1: the global views' mean is what every view predicts")
        if self.global_.count + self.local.count < 2:
            raise ValueError("at least two views are needed in all: with one, the prediction loss is always zero")
        return self


class Augment(Section):
    """Photometric changes, drawn for each view; the defaults are those of LeJEPA (arXiv 2511.08544, experiments)."""

    flip: Probability = Field(0.5, description="probability of a horizontal flip")
    jitter: Probability = Field(0.8, description="probability of colour jitter: the next four, in random order")
    brightness: float = Field(0.4, ge=0, description="jitter: factor in [1 - brightness, 1 + brightness], from 0 up")
    contrast: float = Field(0.4, ge=0, description="jitter: factor of the difference to the mean gray, likewise")
    saturation: float = Field(0.2, ge=0, description="jitter: factor of the difference to gray, likewise")
    hue: float = Field(0.1, ge=0, le=0.5, description="jitter: turn in [-hue, hue]; 0.5 is half of the colour circle")
    grayscale: Probability = Field(0.2, description="probability of losing all colour")
    blur: Probability = Field(0.5, description="probability of Gaussian blur, sigma in [0.1, 2]")
    solarize: Probability = Field(0.2, description="probability of inverting values >= 128")


class Data(Section):
    """Shards of images, how they are read, and the views made of them."""

    shards: list[Source] = Field(
        min_length=1,
        description="tar shards: a path or URL with braces, a list of those, or a mixture [{shards, weight}, ...]",
    )
    exif: bool = Field(
        True, description="turn images as their EXIF or TIFF orientation says; false: as they are stored"
    )
    channels: Positive = Field(3, description="bands of every image, which the encoder takes; 3: RGB")
    mean: tuple[float, ...] = Field(
        (0.485, 0.456, 0.406),
        description="of each channel, as a share of its range, subtracted; default: ImageNet's, as timm's weights expect",
    )
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.229, 0.224, 0.225), description="standard deviation of each channel, likewise, divided by"
    )
    workers: NonNegative = Field(0, description="decoding processes per rank; 0: in the training process")
    prefetch: Positive = Field(2, description="batches each worker prepares ahead")
    shuffle_block: Positive = Field(
        16384, description="samples mixed among each other, shards being in random order; any size, no memory"
    )
    index_dir: FilePath | None = Field(
        None, description="where indexes are written; unset: beside the shards, else in the user's cache"
    )
    cache_dir: FilePath | None = Field(
        None, description="a disk of the node for whole copies of remote shards; unset: samples come by range request"
    )
    cache_gb: float | None = Field(None, gt=0, description="size of that cache in 10^9 bytes; unset: no limit")
    read_timeout: float = Field(
        30.0, gt=0, description="seconds for up to 4 MiB of a remote shard, and without a sign of life of a worker"
    )
    retries: NonNegative = Field(5, description="failures in a row before a remote shard stops the run")
    max_pixels: Positive = Field(
        80_000_000,
        le=178_000_000,
        description="larger images are faults; read from the header (Pillow's own limit: 178e6)",
    )
    max_faults: Positive = Field(16, description="stop after this many samples in a row that cannot be used")
    log_keys: bool = Field(False, description="write which samples every rank consumed to keys/ in the run directory")
    views: Views = Field(Views(), description="crops")
    augment: Augment = Field(Augment(), description="photometric changes")

    @field_validator("shards", mode="before")
    @classmethod
    def _as_mixture(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [{"shards": value}]
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            return [{"shards": value}]
        return value

    def remote_shards(self) -> list[str]:
        """Patterns of all sources that are fetched from elsewhere."""
        return [shard for source in self.shards for shard in source.shards if is_remote(shard)]


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


class SIGRegSection(Section):
    """Sketched isotropic Gaussian regularization (arXiv 2511.08544): Epps-Pulley tests along random directions."""

    num_slices: Positive = Field(1024, description="random directions per step")
    knots: Annotated[int, Field(ge=2)] = Field(17, description="quadrature points on [0, t_max]")
    t_max: float = Field(3.0, gt=0, description="where the integral over frequencies ends")
    estimator: Literal["v", "u"] = Field("v", description="v: Epps-Pulley as published; u: unbiased")
    scale: Literal["n", "reference", "none"] = Field(
        "n", description="factor before the statistic: number of samples, reference_n, or 1"
    )
    reference_n: Positive = Field(256, description="samples that scale=reference stands for")
    communication: Literal["auto", "sums", "embeddings", "distinct"] = Field(
        "auto", description="how ranks meet; all give the same value, auto is the cheapest"
    )
    backend: Literal["auto", "reference", "fused", "native", "triton"] = Field(
        "auto", description="whose arithmetic; all give the same value"
    )
    tf32: bool = Field(
        False,
        description="on CUDA, project fp32 embeddings by products in TF32: the statistic changes by less than 1e-4",
    )


class WeakSIGRegSection(Section):
    """Second moments alone (arXiv 2603.05924): the distance of a sketched covariance to the identity."""

    sketch: Positive = Field(64, description="directions of the covariance")


class VISRegSection(Section):
    """Sorted projections against normal quantiles (arXiv 2606.02572), and scale and centre of every dimension, which may
    stand beside any regularizer."""

    weight: float | None = Field(
        None,
        ge=0,
        description="weight of (1 - sigma)^2 + mu^2 beside the regularizer; unset: 1 with regularizer=visreg, else 0 (off)",
    )
    num_slices: Positive = Field(4096, description="random directions per step")


class Objective(Section):
    """Prediction, and a regularizer that keeps the embeddings apart."""

    regularizer: Literal["sigreg", "weak_sigreg", "visreg"] = Field(
        "sigreg",
        description="what keeps the embeddings apart; weak_sigreg: second moments alone; visreg: sorted projections, scale "
        "and centre, with a lambda of its own (published: 0.6 to 0.9)",
    )
    lambda_: float = Field(0.05, alias="lambda", gt=0, lt=1, description="weight of the regularizer against prediction")
    final_lambda: float | None = Field(
        None, gt=0, lt=1, description="lambda of the last step, towards which it moves by a cosine; unset: constant"
    )
    weighting: Literal["convex", "additive"] = Field(
        "convex", description="convex: (1 - lambda) prediction + lambda regularizer; additive: prediction at weight 1"
    )
    prediction: Literal["mean", "sum"] = Field("mean", description="reduction of the squared error over dimensions")
    joint: bool = Field(False, description="one statistic over the views' pooled embeddings, not one per view")
    accumulation: Literal["micro", "unbiased", "exact"] = Field(
        "micro",
        description="where a step has several micro-batches: the objective of each (micro); the same, unbiased for that of "
        "the whole batch (unbiased, with sigreg.estimator=u); or the whole batch's own, at one more forward pass (exact)",
    )
    sigreg: SIGRegSection = Field(SIGRegSection(), description="settings of regularizer=sigreg")
    weak_sigreg: WeakSIGRegSection = Field(WeakSIGRegSection(), description="settings of regularizer=weak_sigreg")
    visreg: VISRegSection = Field(
        VISRegSection(), description="settings of regularizer=visreg, and VISReg's other terms beside any regularizer"
    )

    @field_validator("visreg")
    @classmethod
    def _as_unset(cls, value: VISRegSection, info: ValidationInfo) -> VISRegSection:
        """A weight that says what an unset one means is unset, as the `0.0` of runs from before it could be."""
        unset = 1.0 if info.data.get("regularizer") == "visreg" else 0.0
        return value.model_copy(update={"weight": None}) if value.weight == unset else value


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


class Checkpoint(Section):
    """When a run is saved, and what is kept."""

    dir: CheckpointDir | None = Field(
        None,
        description="where they are kept: a folder, or a store such as s3://bucket/run; unset: checkpoints/ in run.dir",
    )
    every: Duration = Field(1000, description="steps between checkpoints; the last step is always saved")
    keep: Positive = Field(2, description="newest checkpoints kept")
    keep_every: Duration | None = Field(None, description="steps whose multiples are kept for good; unset: none")
    best: str | None = Field(
        None,
        pattern=r"^(max|min):\w+$",
        description="the best by a metric is kept too: max:probe_accuracy, min:loss, of those in metrics.jsonl; unset: none",
    )
    mode: Literal["async", "sync"] = Field(
        "async",
        description="async: steps go on while a checkpoint is written; takes its bytes once more in host memory, shared out "
        "over the ranks. sync: they wait",
    )
    on_error: Literal["stop", "continue"] = Field(
        "stop",
        description="what becomes of a run that cannot save (a full disk, say); the last save stops it in any case",
    )


class Average(Section):
    """A second set of weights: the average of those along the way, for evaluation and export; the training never sees it."""

    kind: Literal["none", "ema", "swa"] = Field(
        "none",
        description="ema: exponential moving average; swa: the mean of all updates (arXiv 1803.05407). Takes 4 bytes a "
        "parameter, sharded like the weights",
    )
    decay: float = Field(
        0.9999, gt=0, lt=1, description="ema: share kept in a step; after n steps (1 + n) / (10 + n) where that is less"
    )
    every: Duration = Field(10, description="steps between updates of the average")
    start: float | None = Field(
        None, ge=0, lt=1, description="share of train.steps after which it begins; unset: ema 0, swa 0.75"
    )

    @property
    def begins(self) -> float:
        """`start`, or what it stands for where it is unset."""
        return self.start if self.start is not None else {"swa": 0.75}.get(self.kind, 0.0)


class Wandb(Section):
    """Weights & Biases, beside metrics.jsonl."""

    enabled: bool = Field(False, description="send metrics to W&B; kept in the run directory where no key is set")
    project: str = Field("lejepa_scale", description="project of the run at W&B")
    name: str | None = Field(None, description="name of the run at W&B; unset: that of the run directory")


class TensorBoard(Section):
    """TensorBoard, beside metrics.jsonl."""

    enabled: bool = Field(False, description="write metrics to tensorboard/ in the run directory")


class Log(Section):
    """What a run writes while it trains."""

    every: Duration = Field(10, description="steps between lines of metrics.jsonl")
    wandb: Wandb = Field(Wandb(), description="Weights & Biases")
    tensorboard: TensorBoard = Field(TensorBoard(), description="TensorBoard")


class Probe(Section):
    """A linear classifier trained beside the encoder, to which it gives nothing back."""

    enabled: bool = Field(True, description="online linear probe on detached features, where shards hold labels")
    lr: float = Field(1e-3, gt=0, description="its learning rate, constant")


class Evaluation(Section):
    """How good the encoder is while it trains, on held-out images, and whether its embeddings have collapsed."""

    every: Duration | None = Field(None, description="steps between evaluations, with one after the last; unset: none")
    test: list[Shards] | None = Field(
        None, description="held-out shards, with the members and values of data.shards; labels are not needed"
    )
    train: list[Shards] | None = Field(
        None, description="shards whose labels the k-NN and the linear probe learn from; unset: those of data.shards"
    )
    images: Positive = Field(
        2048, description="of each set, evenly spread; held in memory as bytes, shared out over the ranks"
    )
    view_images: NonNegative = Field(
        512, description="held-out images whose views give the loss and LiDAR, rounded to whole steps; 0: neither"
    )
    k: Positive = Field(20, description="neighbours of the k-NN")
    time_share: float = Field(
        0.05,
        gt=0,
        le=1,
        description="of the run's time, at most; what would exceed it is put off, but for the first and the last one",
    )
    rank_floor: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="embeddings that use a smaller share of the directions beyond the first, by their effective rank, have "
        "collapsed, which is told of; 0: never",
    )
    std_floor: float = Field(
        0.1, ge=0, lt=1, description="likewise, of a smaller standard deviation (SIGReg's target is 1)"
    )

    @field_validator("test", "train", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class Config(Section):
    """One run."""

    run: Run
    train: Train
    data: Data
    model: Model
    engine: Engine = Engine()
    objective: Objective = Objective()
    optim: Optim = Optim()
    average: Average = Average()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    probe: Probe = Probe()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _parts_fit(self, info: ValidationInfo) -> Config:
        faults = checks.contradictions(self)
        if not (info.context or {}).get("recorded"):  # what a run has once accepted and written
            faults += checks.ignored_keys(self)
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def image_size(self) -> int:
        """Side in pixels at which the encoder is built and evaluated."""
        return self.model.image_size or self.data.views.global_.size
