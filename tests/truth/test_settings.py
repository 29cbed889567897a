"""Every key of the model and the objective reaches what it is for: numbers of the built module against formulas.

Keys of SIGReg and its relatives are spelled in OBJECTIVE alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_config  # configuration keys: objective.*, model.*, run.seed
from truth import formulas

from lejepa_scale.config import Config, validate
from lejepa_scale.model import build
from lejepa_scale.model.lejepa import build_loss
from lejepa_scale.objective import SIGReg

# What a test sets: the tree of the `objective` section that says so.
OBJECTIVE: dict[str, Any] = {
    "num_slices": lambda value: {"sigreg": {"num_slices": value}},
    "knots": lambda value: {"sigreg": {"knots": value}},
    "t_max": lambda value: {"sigreg": {"t_max": value}},
    "estimator": lambda value: {"sigreg": {"estimator": value}},
    "scale": lambda value: {"sigreg": {"scale": value}},
    "reference_n": lambda value: {"sigreg": {"scale": "reference", "reference_n": value}},
    "communication": lambda value: {"sigreg": {"communication": value}},
    "visreg": lambda value: {"visreg": {"weight": value}},
    "weak": lambda value: {"regularizer": "weak_sigreg", **({"weak_sigreg": {"sketch": value}} if value else {})},
}
Z = torch.from_numpy(np.random.default_rng(0).gamma(2.0, size=(3, 12, 4)) - np.arange(3)[:, None, None])


def configured(*settings: dict[str, Any], seed: int = 0, model: dict[str, Any] | None = None) -> Config:
    merged: dict[str, Any] = {}
    for key, value in (item for setting in settings for item in setting.items()):
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    tree = small_config("u", "u", run={"dir": "u", "seed": seed}, model=model or {})
    return validate({**tree, "objective": merged})


def directions(count: int, seed: int = 0) -> np.ndarray:
    return SIGReg(num_slices=count, seed=seed).directions(5, 4, torch.device("cpu"), torch.float64).numpy()


def few(count: int = 8) -> dict[str, Any]:
    return OBJECTIVE["num_slices"](count)


@pytest.mark.parametrize(("settings", "formula"), [
    ({}, {}),
    (OBJECTIVE["knots"](6), {"knots": 6}),
    (OBJECTIVE["t_max"](4.5), {"t_max": 4.5}),
    (OBJECTIVE["estimator"]("u"), {"unbiased": True}),
    (OBJECTIVE["scale"]("none"), {"factor": 1.0}),
    (OBJECTIVE["scale"]("reference"), {"factor": 256.0}),
    (OBJECTIVE["reference_n"](99), {"factor": 99.0}),
])  # fmt: skip
def test_sigregs_keys(settings: dict[str, Any], formula: dict[str, Any]) -> None:
    terms = build_loss(configured(few(), settings))(Z, 2, step=5)
    assert float(terms.sigreg) == pytest.approx(formulas.sigreg(Z.numpy(), directions(8), **formula), rel=1e-10)


@pytest.mark.parametrize(("count", "seed"), [(3, 0), (8, 6)])
def test_slices_and_seed(count: int, seed: int) -> None:
    terms = build_loss(configured(few(count), seed=seed))(Z, 2, step=5)
    assert float(terms.sigreg) == pytest.approx(formulas.sigreg(Z.numpy(), directions(count, seed)), rel=1e-10)


def test_joint_statistics() -> None:
    pooled = Z.flatten(0, 1)[None].numpy()
    terms = build_loss(configured(few(), {"joint": True}))(Z, 2, step=5)
    assert float(terms.sigreg) == pytest.approx(formulas.sigreg(pooled, directions(8)), rel=1e-10)
    terms = build_loss(configured(OBJECTIVE["weak"](None), {"joint": True}))(Z, 2, step=5)
    assert float(terms.sigreg) == pytest.approx(formulas.weak_sigreg(pooled), rel=1e-10)


def test_visreg_is_its_three_terms() -> None:
    """Shape alone is of `num_slices` directions and of run.seed; scale and centre have weight 1, or that which is given."""
    for weight, seed in ((None, 0), (0.25, 6)):
        section = {"num_slices": 7} | ({} if weight is None else {"weight": weight})
        config = configured({"regularizer": "visreg", "visreg": section, "lambda": 0.6}, seed=seed)
        terms = build_loss(config)(Z, 2, step=5)
        beside = (1 if weight is None else weight) * formulas.scale_and_centre(Z.numpy())
        expected = formulas.shape(Z.numpy(), directions(7, seed)) + beside
        assert float(terms.sigreg) == pytest.approx(expected, rel=1e-10)
        assert float(terms.loss) == pytest.approx(0.4 * float(terms.prediction) + 0.6 * expected, rel=1e-10)


def test_relatives() -> None:
    weak = build_loss(configured(OBJECTIVE["weak"](None)))(Z, 2, step=5)
    assert float(weak.sigreg) == pytest.approx(formulas.weak_sigreg(Z.numpy()), rel=1e-10)
    beside = build_loss(configured(OBJECTIVE["weak"](None), OBJECTIVE["visreg"](1.5)))(Z, 2, step=5)
    assert float(beside.sigreg - weak.sigreg) == pytest.approx(1.5 * formulas.scale_and_centre(Z.numpy()), rel=1e-10)


@pytest.mark.parametrize("sketch", [1, 3])
def test_the_sketch_has_the_width_that_is_asked_for(sketch: int) -> None:
    """Embeddings without variance: the covariance is 0, and || 0 - I_k ||_F is sqrt(k)."""
    terms = build_loss(configured(OBJECTIVE["weak"](sketch)))(torch.ones(2, 6, 4).double(), 1, step=5)
    assert float(terms.sigreg) == pytest.approx(sketch**0.5)


def test_ranks_meet_as_asked() -> None:
    for mode in ("sums", "embeddings", "distinct"):
        regularizer = build_loss(configured(OBJECTIVE["communication"](mode))).regularizer
        assert isinstance(regularizer, SIGReg)
        assert regularizer.mode(8, [1024] * 8, 512) == mode


@pytest.mark.parametrize("weighting", ["convex", "additive"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("lambda_", [0.05, 0.3])
def test_weights_of_the_two_terms(weighting: str, reduction: str, lambda_: float) -> None:
    settings = {"weighting": weighting, "prediction": reduction, "lambda": lambda_}
    loss = build_loss(configured(few(), settings))(Z, 2, step=5).loss
    error = formulas.prediction(Z.numpy(), 2)
    prediction = error.mean() if reduction == "mean" else error.sum(2).mean()
    share = 1 - lambda_ if weighting == "convex" else 1.0
    assert float(loss) == pytest.approx(
        share * prediction + lambda_ * formulas.sigreg(Z.numpy(), directions(8)), rel=1e-10
    )


@pytest.mark.parametrize(("joint", "count"), [(False, 16), (True, 16 * 4)])
def test_unbiased_accumulation_has_the_n_of_the_whole_batch(joint: bool, count: int) -> None:
    """16 images in 4 views."""
    settings = {**OBJECTIVE["estimator"]("u"), "accumulation": "unbiased", "joint": joint}
    terms = build_loss(configured(few(), settings))(Z, 2, step=5)
    z = Z.flatten(0, 1)[None].numpy() if joint else Z.numpy()
    assert float(terms.sigreg) == pytest.approx(
        formulas.sigreg(z, directions(8), unbiased=True, factor=float(count)), rel=1e-10
    )


def test_the_models_keys() -> None:
    """Tokens of the position grid are (image size / patch size)^2, and a class token."""
    model = {
        "encoder": "vit_nano", "image_size": 64, "patch_size": 16, "attention": "sdpa", "drop_path": 0.2,
        "options": {"depth": 3, "mlp_ratio": 2.0}, "projector": {"hidden": 40, "layers": 2, "dim": 9},
        "predictor": {"hidden": 21},
    }  # fmt: skip
    with torch.device("meta"):
        module, plain = (build(configured(model=m)) for m in (model, {"encoder": "vit_nano", "options": {}}))
    encoder = module.encoder
    assert encoder.patch_size == 16
    assert encoder.backbone.pos_embed.shape == (1, 4 * 4 + 1, 128)
    assert encoder.attention == "sdpa"
    assert [block.drop_path for block in encoder.blocks] == pytest.approx([0.0, 0.1, 0.2])
    assert encoder.blocks[0].mlp.fc1.out_features == 256  # type: ignore[union-attr]
    assert [tuple(p.shape) for p in module.projector.parameters() if p.ndim > 1] == [(40, 128), (9, 40)]
    assert module.predictor is not None
    assert [tuple(p.shape) for p in module.predictor.parameters() if p.ndim > 1] == [(21, 9), (9, 21)]
    assert plain.predictor is None
    assert plain.encoder.backbone.pos_embed.shape == (1, 4 * 4 + 1, 128)  # a global view of 32 in patches of 8
    assert (plain.encoder.patch_size, plain.encoder.attention, len(plain.encoder.blocks)) == (8, "auto", 4)
    with torch.device("meta"):
        uniform = build(configured(model={**model, "drop_path_uniform": True}))
    assert [block.drop_path for block in uniform.encoder.blocks] == [0.2] * 3
