"""What happens to pixels, against torchvision, timm and Pillow."""

from __future__ import annotations

import numpy as np
import pytest
import timm.data
import torch
import torchvision.transforms.v2.functional as reference
from PIL import Image
from scipy import stats
from torchvision.transforms import CenterCrop, RandomResizedCrop, Resize

from lejepa_scale.config import Augment
from lejepa_scale.data.images import photometric, pixels, views

IMAGENET = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD


def test_encoders_are_given_what_timms_expect() -> None:
    """The normalization that timm's ImageNet weights were trained with, on both paths."""
    assert (pixels.MEAN, pixels.STD) == IMAGENET
    images = torch.randint(0, 256, (4, 3, 9, 11), dtype=torch.uint8)
    expected = reference.normalize(images.double() / 255, *map(list, IMAGENET)).float()
    torch.testing.assert_close(photometric.normalize(images), expected, rtol=0, atol=2e-6)
    nothing = Augment(flip=0, jitter=0, grayscale=0, blur=0, solarize=0)
    rows = torch.from_numpy(photometric.draw(np.random.default_rng(0).random((4, photometric.DRAWS)), nothing))
    torch.testing.assert_close(photometric.apply(images, rows), expected, rtol=0, atol=2e-5)
    white, black = (photometric.normalize(torch.full((1, 3, 1, 1), v, dtype=torch.uint8)).flatten() for v in (255, 0))
    assert white.tolist() == pytest.approx([2.2489, 2.4286, 2.6400], abs=1e-4)  # well-known extremes of the input
    assert black.tolist() == pytest.approx([-2.1179, -2.0357, -1.8044], abs=1e-4)


def test_grey_is_itu_r_601() -> None:
    """Of pure red, green and blue, as Pillow converts them (in whole levels)."""
    pure = np.zeros((1, 3, 3), np.uint8)
    pure[0, [0, 1, 2], [0, 1, 2]] = 255
    expected = np.asarray(Image.fromarray(pure).convert("L"))[0]  # 76, 150, 29
    rows = photometric.draw(
        np.full((1, photometric.DRAWS), 0.5), Augment(flip=0, jitter=0, grayscale=1, blur=0, solarize=0)
    )
    x = photometric.apply(torch.from_numpy(pure).permute(2, 0, 1)[None], torch.from_numpy(rows))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in IMAGENET)
    levels = 255 * (x[0] * std + mean)
    np.testing.assert_allclose(levels[:, 0].numpy(), np.tile(expected, (3, 1)), atol=0.51)


@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.97, 0.99)])
def test_a_box_is_tried_ten_times(scale: tuple[float, float]) -> None:
    """A large part of 80 x 100 pixels seldom fits: how often none of ten attempts does, against torchvision."""
    trials = 4000
    draws = np.random.default_rng(1).random((trials, views.DRAWS))
    mine = views.crop_boxes(80, 100, scale, draws)
    image = torch.empty(3, 80, 100)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(trials)])
    given_up = [int(((boxes[:, 2] == 80) & (boxes[:, 3] == 100)).sum()) for boxes in (mine, theirs)]
    assert min(given_up) > 0.01 * trials
    table = [[n, trials - n] for n in given_up]
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_boxes_reach_every_border() -> None:
    """torchvision draws the corner from 0 to the room that is left, both included."""
    draws = np.full((2, views.DRAWS), 0.5)
    draws[:, -2:] = [[0, 0], [1 - 1e-9, 1 - 1e-9]]
    first, last = views.crop_boxes(60, 90, (0.25, 0.25), draws).tolist()
    assert first[:2] == [0, 0]
    assert last[:2] == [60 - last[2], 90 - last[3]]
    assert first[2:] == last[2:] == [37, 37]  # a square of a quarter of the area: sqrt(1350) = 36.74


@pytest.mark.parametrize("shape", [(120, 180), (180, 120), (96, 96), (120, 240), (20, 400)])
def test_evaluation_images_are_torchvisions(shape: tuple[int, int]) -> None:
    """Resize of the short side and CenterCrop on a Pillow image."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize(
        shape[::-1], Image.Resampling.BICUBIC
    )
    expected = np.asarray(CenterCrop(40)(Resize(40)(coarse))).astype(int)
    difference = np.abs(views.centre_square(np.array(coarse), 40).astype(int) - expected)
    assert difference.max() <= 2
    assert difference.mean() < 0.2
