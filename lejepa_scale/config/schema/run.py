"""A run: where it lives, how long it is, how its steps are computed, and what it keeps and tells."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PlainSerializer, WrapValidator, model_validator

from lejepa_scale.addresses import Address
from lejepa_scale.config.schema.section import AsItIs, Duration, FilePath, NonNegative, Positive, Section
from lejepa_scale.config.words import steps_alone

CheckpointDir = Annotated[
    str, AfterValidator(os.path.expanduser), AfterValidator(Address), PlainSerializer(str, return_type=str)
]
EngineName = Literal["single", "ddp", "fsdp", "zero1", "zero2", "zero3"]


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
    steps: Annotated[Positive, WrapValidator(steps_alone), AsItIs] = Field(  # type: ignore[assignment]
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
