"""What is measured of a run's encoder."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from lejepa_scale.config.schema.data import Shards
from lejepa_scale.config.schema.section import Duration, NonNegative, Positive, Section


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
