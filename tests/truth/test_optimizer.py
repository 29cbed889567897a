"""What one update does to the parameters: AdamW from the paper, decay as timm groups it, clipping as torch's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import small_config  # configuration keys: engine.*, model.*, optim.*
from steps import start
from timm.optim import param_groups_weight_decay
from truth import formulas

from lejepa_scale.config import Config, validate
from lejepa_scale.engine import Engine

# class and register tokens, positions, layer scale, norms: everything that is not decayed
ENCODER = {
    "encoder": "vit_small_patch14_reg4_dinov2",
    "options": {"depth": 1, "embed_dim": 48, "num_heads": 3},
    "patch_size": 16,
    "predictor": {"hidden": 12},
}


def build_small(**sections: dict[str, Any]) -> tuple[Engine, Config]:
    config = validate(small_config("unused", "unused", model=ENCODER, **sections))
    return start(config)[0], config


def run_backward(engine: Engine, seed: int, factor: float = 1.0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    out = engine.forward([torch.randn(2, 6, 3, s, s, generator=generator) for s in (32, 16)], seed)
    engine.backward(factor * out["loss"], True)
    return out


def weights(engine: Engine) -> dict[str, np.ndarray]:
    return {name: p.detach().double().numpy().copy() for name, p in engine.module.named_parameters()}


def timm_decays(engine: Engine) -> set[str]:
    """Parameters that timm's own rule decays: of the encoder by its list, of the heads by their shapes."""
    backbone = timm.create_model(**engine.module.encoder.timm_arguments)
    names = {id(p): f"encoder.backbone.{name}" for name, p in backbone.named_parameters()}
    groups = param_groups_weight_decay(backbone, 1.0, no_weight_decay_list=backbone.no_weight_decay())
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    for part in ("projector", "predictor"):
        module = getattr(engine.module, part)
        of_part = {id(p): f"{part}.{name}" for name, p in module.named_parameters()}
        groups = param_groups_weight_decay(module, 1.0)
        decayed |= {of_part[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    return decayed


def test_without_a_gradient_weights_shrink_by_lr_times_decay_and_nothing_else_moves() -> None:
    """AdamW's decay alone: w (1 - lr wd) where timm's rule decays; biases, norms, scales, tokens and positions stay."""
    engine, _ = build_small()
    before, decayed = weights(engine), timm_decays(engine)
    run_backward(engine, 0, factor=0.0)
    engine.step(0.1, 0.5)
    after = weights(engine)
    for name in before:
        expected = before[name] * (0.95 if name in decayed else 1.0)
        np.testing.assert_allclose(after[name], expected, rtol=1e-6, atol=0, err_msg=name)
    still = before.keys() - decayed
    for part in ("bias", "norm1.weight", "ls1.gamma", "cls_token", "reg_token", "pos_embed", "projector.1.weight"):
        assert any(name.endswith(part) for name in still), part
    assert any(name.endswith("patch_embed.proj.weight") for name in decayed)


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.5, 0.6)])
@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_three_updates_are_adamws(betas: tuple[float, float], eps: float) -> None:
    """With the rate and the decay that `step` is handed, not those of the configuration."""
    engine, _ = build_small(optim={"betas": list(betas), "eps": eps, "lr": 0.5, "weight_decay": 0.9})
    before, decayed, gradients = weights(engine), timm_decays(engine), []
    for seed in range(3):
        run_backward(engine, seed)
        gradients.append({n: p.grad.double().numpy().copy() for n, p in engine.module.named_parameters()})
        engine.step(0.01, 0.2)
    after = weights(engine)
    for name in before:
        expected = formulas.adamw(
            before[name],
            [g[name] for g in gradients],
            lr=0.01, betas=betas, eps=eps, weight_decay=0.2 if name in decayed else 0.0,
        )  # fmt: skip
        np.testing.assert_allclose(after[name], expected, rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("limit", [None, 0.05, 1e6])
def test_gradients_are_clipped_by_their_global_norm(limit: float | None) -> None:
    """All by one factor, limit / norm, where the norm is larger. An epsilon far above the gradients shows their size."""
    engine, _ = build_small(optim={"eps": 10.0, "betas": [0.9, 0.95], "clip_norm": limit})
    before = weights(engine)
    run_backward(engine, 0)
    gradients = {n: p.grad.double().numpy().copy() for n, p in engine.module.named_parameters()}
    norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    assert norm > 0.1
    found = engine.step(0.5, 0.0).grad_norm
    assert float(found) == pytest.approx(norm, rel=1e-5)  # before clipping
    factor = min(1.0, limit / norm) if limit else 1.0
    for name, after in weights(engine).items():
        moved = 0.5 * np.abs(factor * gradients[name]) / (np.abs(factor * gradients[name]) + 10)
        np.testing.assert_allclose(np.abs(after - before[name]), moved, rtol=1e-3, atol=2e-7, err_msg=name)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_precision_is_that_of_products_and_not_of_parameters(precision: str, dtype: torch.dtype) -> None:
    engine, _ = build_small(engine={"name": "single", "precision": precision})
    out = run_backward(engine, 0)
    assert out["embeddings"].dtype == dtype  # what the last linear layer gives
    assert out["loss"].dtype == torch.float32
    assert {p.dtype for p in engine.module.parameters()} == {torch.float32}
