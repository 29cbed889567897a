"""configs/vits8_imagenette.yaml against the published minimal recipe that it follows (github.com/rbalestr-lab/lejepa,
MINIMAL.md of 2025-11-20), whose parts are made here by torchvision, timm and torch with the numbers of that page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torchvision.ops import MLP
from torchvision.transforms import v2
from truth import formulas

from lejepa_scale.config import Config, load_config
from lejepa_scale.data.images import photometric
from lejepa_scale.engine.optim import adamw
from lejepa_scale.model import build
from lejepa_scale.objective import SIGReg
from lejepa_scale.training.schedule import learning_rate

RECIPE = Path(__file__).parents[2] / "configs" / "vits8_imagenette.yaml"
SHALLOW = "model.options={depth: 2}"  # for speed; the other ten blocks are like these


def recipe(*overrides: str) -> Config:
    return load_config(RECIPE, list(overrides))


def theirs(depth: int, drop_path: float) -> tuple[nn.Module, nn.Module]:
    """MINIMAL.md, class ViTEncoder."""
    backbone = timm.create_model(
        "vit_small_patch8_224", pretrained=False, num_classes=512, drop_path_rate=drop_path, img_size=128, depth=depth
    )
    return backbone, MLP(512, [2048, 2048, 16], norm_layer=nn.BatchNorm1d)


def test_embeddings_features_and_loss() -> None:
    """The same weights and 4 views of 6 images: forward pass of MINIMAL.md, and its loss along our directions."""
    torch.manual_seed(0)
    model = build(recipe(SHALLOW, "model.drop_path=0")).train()
    backbone, mlp = theirs(2, 0.0)
    backbone.load_state_dict(model.encoder.backbone.state_dict())
    for name, parameter in mlp.named_parameters():
        nn.init.normal_(parameter, std=0.1)  # hidden biases too, which batch normalization takes away again
        if name in ("0.bias", "4.bias"):
            continue
        ours = {"0": "0", "1": "1", "4": "2", "5": "3", "8": "4"}[name.split(".")[0]]
        model.projector.get_parameter(f"{ours}.{name.split('.')[1]}").data.copy_(parameter.data)
    views = torch.randn(4, 6, 3, 128, 128)
    out = model([views], 0)
    with torch.no_grad():
        features = backbone(views.flatten(0, 1))
        embeddings = mlp.train()(features).unflatten(0, (4, 6))
    torch.testing.assert_close(out["features"], features.unflatten(0, (4, 6)).mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out["embeddings"], embeddings.mean(0), rtol=1e-3, atol=1e-4)
    regularizer = model.loss.regularizer
    assert isinstance(regularizer, SIGReg)
    directions = regularizer.directions(0, 16, torch.device("cpu"), torch.float32).double().numpy()
    assert len(directions) == 256
    proj = embeddings.double().numpy()
    invariance = np.square(proj.mean(0) - proj).mean()
    assert out["loss"].item() == pytest.approx(0.02 * formulas.sigreg(proj, directions) + 0.98 * invariance, rel=1e-4)


def test_stochastic_depth_has_their_rates() -> None:
    with torch.device("meta"):
        blocks, backbone = build(recipe()).encoder.blocks, theirs(12, 0.1)[0]
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in backbone.blocks]
    assert [block.drop_path for block in blocks] == pytest.approx(rates)
    assert rates[-1] == pytest.approx(0.1)


def test_the_optimizer_is_adamw_with_torchs_defaults_over_everything() -> None:
    config = recipe(SHALLOW)
    with torch.device("meta"):
        model = build(config)
    ours, plain = adamw(model, config.optim), torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    assert [group["decayed"] for group in ours.param_groups] == [True]
    assert len(ours.param_groups[0]["params"]) == len(list(model.parameters()))
    assert (ours.defaults["betas"], ours.defaults["eps"]) == (plain.defaults["betas"], plain.defaults["eps"])
    assert (config.optim.weight_decay, config.optim.clip_norm) == (5e-2, None)


def test_every_learning_rate_is_that_of_their_schedulers() -> None:
    """800 epochs of 9,469 // 256 steps. Their cosine would end one step after the last."""
    config, epoch = recipe(), 9469 // 256
    assert config.train.steps == 800 * epoch
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=2e-3)
    warmup = LinearLR(optimizer, start_factor=0.01, total_iters=epoch)
    cosine = CosineAnnealingLR(optimizer, T_max=799 * epoch, eta_min=1e-3)
    scheduler = SequentialLR(optimizer, schedulers=[warmup, cosine], milestones=[epoch])
    expected = []
    for _ in range(config.train.steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    found = [learning_rate(step, config.train.steps, config.optim) for step in range(config.train.steps)]
    np.testing.assert_allclose(found[: epoch + 1], expected[: epoch + 1], rtol=1e-9)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_colours_are_drawn_as_often_and_as_strongly() -> None:
    draws = np.random.default_rng(0).uniform(size=(200_000, photometric.DRAWS))
    rows = photometric.draw(draws, recipe().data.augment)
    jittered = rows[:, photometric.ORDER] >= 0
    assert jittered.mean() == pytest.approx(0.8, abs=0.005)
    jitter = v2.ColorJitter(0.8, 0.8, 0.8, 0.2)
    for column, interval in (
        (photometric.BRIGHTNESS, jitter.brightness),
        (photometric.CONTRAST, jitter.contrast),
        (photometric.SATURATION, jitter.saturation),
        (photometric.HUE, jitter.hue),
    ):
        assert (rows[:, column].min(), rows[:, column].max()) == pytest.approx(interval, abs=1e-3)
        assert rows[:, column].mean() == pytest.approx(np.mean(interval), abs=5e-3)
    for column, share in ((photometric.FLIP, 0.5), (photometric.GRAYSCALE, 0.2), (photometric.SIGMA, 0.5)):
        assert (rows[:, column] > 0).mean() == pytest.approx(share, abs=0.005)
    assert v2.RandomApply([v2.GaussianBlur(7, (0.1, 2.0))]).p == 0.5
    assert (rows[:, photometric.SOLARIZE] > 0).mean() == pytest.approx(0.1, abs=0.005)


def test_their_solarization_acts_on_a_tenth_of_the_views() -> None:
    """RandomApply hands a fifth of them to a RandomSolarize, which has a probability of its own."""
    torch.manual_seed(0)
    solarize, white = (
        v2.RandomApply([v2.RandomSolarize(threshold=128)], p=0.2),
        torch.full((3, 1, 1), 255, dtype=torch.uint8),
    )
    changed = sum(int(solarize(white).sum()) == 0 for _ in range(4000))
    assert changed / 4000 == pytest.approx(0.1, abs=0.02)


def test_views() -> None:
    views = recipe().data.views
    assert (views.global_.count, views.global_.size, views.global_.scale) == (4, 128, (0.08, 1.0))
    assert views.local.count == 0
