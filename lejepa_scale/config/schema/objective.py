"""What is minimized."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from lejepa_scale.config.schema.section import Positive, Section


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
