"""Crops and colours against torchvision: the same distribution, and the same result for the same parameters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as reference
from torchvision.transforms import RandomResizedCrop

from lejepa_scale.config import Augment, ViewGroup
from lejepa_scale.data import photometric as ours
from lejepa_scale.data.views import centre_square, crop_box, cut_views

IMAGES = torch.randint(0, 256, (6, 3, 24, 24), dtype=torch.uint8)


def parameters(**columns: float) -> torch.Tensor:
    """Identity but for the given columns."""
    row = np.zeros((len(IMAGES), ours.WIDTH), np.float32)
    row[:, [ours.BRIGHTNESS, ours.CONTRAST, ours.SATURATION]] = 1
    row[:, ours.ORDER] = -1
    for name, value in columns.items():
        row[:, getattr(ours, name.upper())] = value
    return torch.from_numpy(row)


def augmented(**columns: float) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (ours.MEAN, ours.STD))
    return ours.apply(IMAGES, parameters(**columns)) * std + mean


X = IMAGES.float() / 255


def test_identity_is_normalisation() -> None:
    torch.testing.assert_close(ours.apply(IMAGES, parameters()), ours.normalise(IMAGES))


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"flip": 1}, lambda: reference.horizontal_flip(X)),
        ({"order": 0, "brightness": 1.3}, lambda: reference.adjust_brightness(X, 1.3)),
        ({"order": 0, "contrast": 0.7}, lambda: reference.adjust_contrast(X, 0.7)),
        ({"order": 0, "saturation": 1.2}, lambda: reference.adjust_saturation(X, 1.2)),
        ({"order": 0, "hue": 0.08}, lambda: reference.adjust_hue(X, 0.08)),
        ({"order": 0, "hue": -0.5}, lambda: reference.adjust_hue(X, -0.5)),
        ({"grayscale": 1}, lambda: reference.rgb_to_grayscale(X, 3)),
        ({"sigma": 1.4}, lambda: reference.gaussian_blur(X, [7, 7], [1.4, 1.4])),
        ({"solarize": 1}, lambda: reference.solarize(X, 128 / 255)),
    ],
)
def test_each_operation_equals_torchvision(columns: dict, expected) -> None:
    torch.testing.assert_close(augmented(**columns), expected(), atol=2e-3, rtol=0)


@pytest.mark.parametrize("order", range(24))
def test_jitter_in_every_order(order: int) -> None:
    steps = [
        lambda x: reference.adjust_brightness(x, 1.2),
        lambda x: reference.adjust_contrast(x, 0.8),
        lambda x: reference.adjust_saturation(x, 1.1),
        lambda x: reference.adjust_hue(x, 0.05),
    ]
    x = X
    for number in ours._ORDERS[order]:
        x = steps[number](x)
    found = augmented(order=order, brightness=1.2, contrast=0.8, saturation=1.1, hue=0.05)
    torch.testing.assert_close(found, x, atol=4e-3, rtol=0)


def test_images_are_treated_one_by_one() -> None:
    """A batch of different parameters equals each image alone."""
    drawn = torch.from_numpy(ours.draw(len(IMAGES), Augment(), np.random.default_rng(0)))
    alone = torch.cat([ours.apply(IMAGES[i : i + 1], drawn[i : i + 1]) for i in range(len(IMAGES))])
    torch.testing.assert_close(ours.apply(IMAGES, drawn), alone)


def test_drawn_parameters_have_the_stated_distribution() -> None:
    rows = ours.draw(20000, Augment(), np.random.default_rng(0))
    rates = {ours.FLIP: 0.5, ours.GRAYSCALE: 0.2, ours.SOLARIZE: 0.2}
    for column, rate in rates.items():
        assert rows[:, column].mean() == pytest.approx(rate, abs=0.02)
    assert (rows[:, ours.ORDER] >= 0).mean() == pytest.approx(0.8, abs=0.02)
    assert (rows[:, ours.SIGMA] > 0).mean() == pytest.approx(0.5, abs=0.02)
    for column, low, high in ((ours.BRIGHTNESS, 0.6, 1.4), (ours.SATURATION, 0.8, 1.2), (ours.HUE, -0.1, 0.1)):
        assert rows[:, column].min() == pytest.approx(low, abs=0.01)
        assert rows[:, column].max() == pytest.approx(high, abs=0.01)
        assert rows[:, column].mean() == pytest.approx((low + high) / 2, abs=0.01)


@pytest.mark.parametrize("scale", [(0.05, 0.3), (0.3, 1.0)])
def test_crops_have_the_distribution_of_torchvision(scale: tuple[float, float]) -> None:
    image = torch.empty(3, 120, 180)
    rng = np.random.default_rng(0)
    mine = np.array([crop_box(120, 180, scale, rng) for _ in range(4000)], float)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(4000)], float)
    for boxes in (mine, theirs):
        assert (boxes[:, 0] + boxes[:, 2] <= 120).all()
        assert (boxes[:, 1] + boxes[:, 3] <= 180).all()
    for statistic in (
        lambda b: b[:, 2] * b[:, 3] / (120 * 180),
        lambda b: np.log(b[:, 3] / b[:, 2]),
        lambda b: b[:, 0] + b[:, 2] / 2,
        lambda b: b[:, 1] + b[:, 3] / 2,
    ):
        a, b = statistic(mine), statistic(theirs)
        error = math.sqrt(a.var() / len(a) + b.var() / len(b))
        assert abs(a.mean() - b.mean()) < 4 * error
        assert a.std() == pytest.approx(b.std(), rel=0.06)


def test_views_have_their_shapes_and_tiny_or_long_images_work() -> None:
    group = ViewGroup(count=3, size=16, scale=(0.05, 0.3))
    for shape in ((1, 1), (2, 300), (300, 2), (64, 48)):
        image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
        assert cut_views(image, group, np.random.default_rng(1)).shape == (3, 16, 16, 3)
        assert centre_square(image, 20).shape == (20, 20, 3)
