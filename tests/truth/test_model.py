"""Heads, normalization and what a forward pass hands out, against torch's and timm's modules."""

from __future__ import annotations

import copy
from typing import Literal

import pytest
import timm
import torch
from conftest import small_config  # configuration keys: model.*
from torch import nn

from lejepa_scale.config import validate
from lejepa_scale.model import build
from lejepa_scale.model.norm import BatchNorm, synchronized
from lejepa_scale.model.projector import Predictor, Projector


def copied(source: nn.Module, target: nn.Module) -> nn.Module:
    """`target` with the parameters of `source`, in order."""
    pairs = zip(source.parameters(), target.parameters(), strict=True)
    for mine, theirs in pairs:
        theirs.data.copy_(mine.data)
    return target


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(("activation", "module"), [("gelu", nn.GELU), ("relu", nn.ReLU)])
def test_the_projector_is_linear_batch_norm_activation(
    layers: int, activation: Literal["gelu", "relu"], module: type[nn.Module]
) -> None:
    projector = Projector(7, 11, 5, layers, activation).double()
    for parameter in projector.parameters():
        nn.init.normal_(parameter)
    parts: list[nn.Module] = []
    width = 7
    for _ in range(layers - 1):
        parts += [nn.Linear(width, 11, bias=False), nn.BatchNorm1d(11), module()]
        width = 11
    plain = copied(projector, nn.Sequential(*parts, nn.Linear(width, 5)).double())
    x = torch.randn(40, 7, dtype=torch.float64)
    torch.testing.assert_close(projector(x), plain(x))


def test_the_predictor_is_linear_gelu_linear() -> None:
    predictor = Predictor(6, 9).double()
    plain = copied(predictor, nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)).double())
    x = torch.randn(8, 6, dtype=torch.float64)
    torch.testing.assert_close(predictor(x), plain(x))


def two_batches(module: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    outputs = [module(torch.randn(12, 4, generator=generator).double() * 0.01 + 2) for _ in range(2)]
    return {
        "outputs": torch.stack(outputs).detach(),
        **{k: v for k, v in module.state_dict().items() if "running" in k},
    }


def test_batch_norm_has_torchs_defaults() -> None:
    """Small deviations, where epsilon shows."""
    found, expected = (two_batches(m.double()) for m in (BatchNorm(4, track=True), nn.BatchNorm1d(4)))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("momentum", [0.1, 0.3])
def test_a_replaced_batch_norm_keeps_its_own_settings(momentum: float) -> None:
    theirs = nn.Sequential(nn.BatchNorm1d(4, eps=1e-2, momentum=momentum)).double()
    ours = synchronized(copy.deepcopy(theirs))
    assert isinstance(ours[0], BatchNorm)
    torch.testing.assert_close(two_batches(ours), two_batches(theirs))


def test_the_probes_features_are_those_of_the_global_views() -> None:
    """timm's encoder view by view, averaged over the global views alone; embeddings likewise."""
    config = validate(small_config("u", "u"))
    module = build(config).double()
    views = [torch.randn(v, 5, 3, s, s).double() for v, s in ((2, 32), (2, 16))]
    out = module(views, 0)
    plain = timm.create_model(**module.encoder.timm_arguments).double().eval()
    plain.load_state_dict(module.encoder.backbone.state_dict())
    with torch.no_grad():
        features = torch.stack([plain(view) for group in views for view in group])  # [4, B, E]
        embeddings = module.projector(features.flatten(0, 1)).unflatten(0, (4, 5))
    torch.testing.assert_close(out["features"], features[:2].mean(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(out["embeddings"], embeddings[:2].mean(0), rtol=1e-6, atol=1e-7)
