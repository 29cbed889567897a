"""Crops and colours against torchvision: the same distribution, and the same result for the same parameters."""

from __future__ import annotations

import gc
import os
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
import torchvision.transforms.v2.functional as reference
from conftest import on_a_gpu
from PIL import Image
from scipy import stats
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from lejepa_scale.config import Augment, BatchPlan, Data, ViewGroup, Views
from lejepa_scale.data import Batch, Loader, open_mixture
from lejepa_scale.data.device import Beside
from lejepa_scale.data.images import photometric as ours
from lejepa_scale.data.images import views as geometry

IMAGENET = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
IMAGES = torch.randint(0, 256, (6, 3, 24, 24), dtype=torch.uint8)
Path_ = Callable[[Tensor, np.ndarray], Tensor]
WAYS: dict[str, Path_] = {"cpu": ours._one_by_one, "gpu": ours._together}
if os.environ.get("TRITON_INTERPRET") == "1":  # as test_photometric_triton.py runs this file
    from lejepa_scale.data.images.photometric_triton import fused

    WAYS["triton"] = fused
PATHS = pytest.mark.parametrize("path", WAYS.values(), ids=WAYS.keys())


def parameters(**columns: float) -> torch.Tensor:
    """Identity but for the given columns."""
    row = np.zeros((len(IMAGES), ours.WIDTH), np.float32)
    row[:, [ours.BRIGHTNESS, ours.CONTRAST, ours.SATURATION]] = 1
    row[:, ours.ORDER] = -1
    for name, value in columns.items():
        row[:, getattr(ours, name.upper())] = value
    return torch.from_numpy(row)


def augmented(path: Path_, images: Tensor, rows: Tensor) -> Tensor:
    """Values 0..1, before normalization."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in IMAGENET)
    return path(images, rows.numpy()) * std + mean


X = IMAGES.float() / 255


@PATHS
def test_identity_is_normalization(path: Path_) -> None:
    torch.testing.assert_close(path(IMAGES, parameters().numpy()), ours.normalize(IMAGES))
    torch.testing.assert_close(ours.normalize(IMAGES), reference.normalize(X, *map(list, IMAGENET)))


@PATHS
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
def test_each_operation_equals_torchvision(columns: dict, expected, path: Path_) -> None:
    torch.testing.assert_close(
        augmented(path, IMAGES, parameters(**columns)), expected(), atol=2e-4, rtol=0
    )  # torchvision's luma has 0.2989


JITTER = (
    reference.adjust_brightness,
    reference.adjust_contrast,
    reference.adjust_saturation,
    reference.adjust_hue,
)


@PATHS
@pytest.mark.parametrize("order", range(24))
def test_jitter_in_every_order(order: int, path: Path_) -> None:
    factors = (1.2, 0.8, 1.1, 0.05)
    x = X
    for number in ours._ORDERS[order]:
        x = JITTER[number](x, factors[number])
    rows = parameters(order=order, **dict(zip(("brightness", "contrast", "saturation", "hue"), factors, strict=True)))
    torch.testing.assert_close(augmented(path, IMAGES, rows), x, atol=4e-4, rtol=0)


def chain(x, row: list[float]):
    """torchvision's functions with the parameters of a row, on a Pillow image or a float tensor."""
    if row[ours.FLIP]:
        x = reference.horizontal_flip(x)
    if row[ours.ORDER] >= 0:
        for number in ours._ORDERS[int(row[ours.ORDER])]:
            x = JITTER[number](x, row[ours.BRIGHTNESS + number])
    if row[ours.GRAYSCALE]:
        x = reference.rgb_to_grayscale(x, 3)
    if row[ours.SIGMA]:
        x = reference.gaussian_blur(x, [7, 7], [row[ours.SIGMA]] * 2)
    if row[ours.SOLARIZE]:
        x = reference.solarize(x, 128 / 255 if torch.is_tensor(x) else 128)
    return x


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A picture with coarse and fine detail, uint8 [h, w, 3]."""
    rng = np.random.default_rng(seed)
    layers = [rng.uniform(0, 255, (3, max(2, height // s), max(2, width // s))) for s in (40, 8, 2)]
    x = sum(
        share * torch.nn.functional.interpolate(torch.from_numpy(layer)[None], (height, width), mode="bicubic")[0]
        for share, layer in zip((0.6, 0.3, 0.1), layers, strict=True)
    )
    return x.clamp(0, 255).permute(1, 2, 0).numpy().astype(np.uint8)


@PATHS
def test_the_whole_chain_equals_torchvisions(path: Path_) -> None:
    """On floats to rounding; but solarization has no jump at its threshold, which moves what lies between 127.5 and
    128 by up to one level. Pillow rounds to whole levels after every operation, and hue to 256 angles."""
    count = 24
    images = torch.stack([torch.from_numpy(smooth(32, 40, i)).permute(2, 0, 1) for i in range(count)])
    rows = torch.from_numpy(ours.draw(np.random.default_rng(1).random((count, ours.DRAWS)), Augment()))
    assert all((rows[:, [ours.FLIP, ours.GRAYSCALE, ours.SIGMA, ours.SOLARIZE]] > 0).sum(0) > 2)
    found = 255 * augmented(path, images, rows)
    exact = 255 * torch.cat([chain(images[i : i + 1] / 255, rows[i].tolist()) for i in range(count)])
    difference = (found - exact).abs()
    assert difference.max() < 1.01
    assert (difference > 0.1).double().mean() < 0.01
    pillow = [
        chain(Image.fromarray(x.permute(1, 2, 0).numpy()), row) for x, row in zip(images, rows.tolist(), strict=True)
    ]
    pillow = torch.stack([torch.from_numpy(np.array(x)).permute(2, 0, 1) for x in pillow])
    assert (found - pillow).abs().mean() < 1.5
    assert (found - pillow).abs().mean((1, 2, 3)).max() < 4


def test_both_paths_give_the_same() -> None:
    rows = ours.draw(np.random.default_rng(0).random((6, ours.DRAWS)), Augment(hue=0.5))
    torch.testing.assert_close(ours._one_by_one(IMAGES, rows), ours._together(IMAGES, rows), atol=1e-3, rtol=0)


@PATHS
def test_images_are_treated_one_by_one(path: Path_) -> None:
    """A batch of different parameters equals each image alone, and the images are left as they were."""
    drawn = ours.draw(np.random.default_rng(0).random((6, ours.DRAWS)), Augment())
    before = IMAGES.clone()
    alone = torch.cat([path(IMAGES[i : i + 1], drawn[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(path(IMAGES, drawn), alone)
    assert IMAGES.equal(before)


def test_drawn_parameters_have_the_stated_distribution() -> None:
    """Probabilities and uniform factors, as torchvision's ColorJitter, RandomApply and the others draw them."""
    rows = ours.draw(np.random.default_rng(0).random((20000, ours.DRAWS)), Augment())
    happens = {
        "flip": (rows[:, ours.FLIP], 0.5),
        "jitter": (rows[:, ours.ORDER] >= 0, 0.8),
        "grayscale": (rows[:, ours.GRAYSCALE], 0.2),
        "blur": (rows[:, ours.SIGMA] > 0, 0.5),
        "solarize": (rows[:, ours.SOLARIZE], 0.2),
    }
    for name, (found, rate) in happens.items():
        assert stats.binomtest(int(found.sum()), len(rows), rate).pvalue > 1e-3, name
    ranges = {
        ours.BRIGHTNESS: (0.6, 1.4),
        ours.CONTRAST: (0.6, 1.4),
        ours.SATURATION: (0.8, 1.2),
        ours.HUE: (-0.1, 0.1),
    }
    for column, (low, high) in ranges.items():
        assert stats.kstest(rows[:, column], "uniform", (low, high - low)).pvalue > 1e-3
    sigma = rows[rows[:, ours.SIGMA] > 0, ours.SIGMA]
    assert stats.kstest(sigma, "uniform", (0.1, 1.9)).pvalue > 1e-3
    orders = np.bincount(rows[rows[:, ours.ORDER] >= 0, ours.ORDER].astype(int), minlength=24)
    assert stats.chisquare(orders).pvalue > 1e-3
    correlations = np.corrcoef(rows[:, [c for c in range(ours.WIDTH) if c != ours.ORDER]].T) - np.eye(8)
    assert np.abs(correlations).max() < 0.03  # none decides about another


@pytest.mark.parametrize("scale", [(0.05, 0.3), (0.3, 1.0)])
def test_crops_have_the_distribution_of_torchvision(scale: tuple[float, float]) -> None:
    image = torch.empty(3, 120, 180)
    mine = geometry.crop_boxes(120, 180, scale, np.random.default_rng(0).random((4000, geometry.DRAWS))).astype(float)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(4000)], float)
    for boxes in (mine, theirs):
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 0] + boxes[:, 2] <= 120).all()
        assert (boxes[:, 1] + boxes[:, 3] <= 180).all()
    statistics: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "area": lambda b: b[:, 2] * b[:, 3],
        "aspect": lambda b: b[:, 3] / b[:, 2],
        "height": lambda b: b[:, 2],
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "room below": lambda b: 120 - b[:, 0] - b[:, 2],
        "room beside": lambda b: 180 - b[:, 1] - b[:, 3],
    }
    for name, statistic in statistics.items():
        assert stats.ks_2samp(statistic(mine), statistic(theirs)).pvalue > 1e-3, name


@pytest.mark.parametrize("shape", [(10, 300), (300, 10), (1, 1), (1, 50)])
def test_where_no_box_fits_the_centre_is_torchvisions(shape: tuple[int, int]) -> None:
    (mine,) = geometry.crop_boxes(*shape, (1.0, 1.0), np.random.default_rng(0).random((1, geometry.DRAWS)))
    theirs = RandomResizedCrop.get_params(torch.empty(3, *shape), [1.0, 1.0], [3 / 4, 4 / 3])
    assert tuple(mine) == tuple(theirs)


@pytest.mark.parametrize(("size", "scale"), [(98, (0.05, 0.3)), (48, (0.3, 1.0)), (300, (0.3, 1.0))])
def test_cut_and_resized_as_pillow_does(size: int, scale: tuple[float, float]) -> None:
    """The same boxes through Pillow's antialiased bilinear resizer: within two levels anywhere, 0.2 on average."""
    image, group = smooth(320, 440), ViewGroup(count=8, size=size, scale=scale)
    draws = np.random.default_rng(2).random((8, geometry.DRAWS))
    found = geometry.cut_views(image, group, draws)
    boxes = geometry.crop_boxes(320, 440, scale, draws).tolist()
    for view, (top, left, h, w) in zip(found, boxes, strict=True):
        theirs = reference.resized_crop(Image.fromarray(image), top, left, h, w, [size, size])
        difference = (view.permute(1, 2, 0).int() - torch.from_numpy(np.array(theirs)).int()).abs()
        assert difference.max() <= 2
        assert difference.double().mean() < 0.2


def test_views_have_their_shapes_and_tiny_or_long_images_work(monkeypatch: pytest.MonkeyPatch) -> None:
    original = geometry._resized
    group = ViewGroup(count=3, size=16, scale=(0.05, 0.3))
    for shape in ((1, 1), (2, 300), (300, 2), (64, 48)):
        image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
        draws = np.random.default_rng(1).random((3, geometry.DRAWS))
        assert geometry.cut_views(image, group, draws).shape == (3, 3, 16, 16)
        assert geometry.centre_square(image, 20).shape == (20, 20, 3)
    for shape in ((10_000, 1), (1, 10_000)):  # of which no more than the middle is made larger
        resized: list[tuple[int, int]] = []
        monkeypatch.setattr(geometry, "_resized", lambda *a, to=resized: to.append(a[1:]) or original(*a))
        assert geometry.centre_square(np.zeros((*shape, 3), np.uint8), 224).shape == (224, 224, 3)
        assert max(resized[0]) <= 8 * 224


@PATHS
@pytest.mark.parametrize("side", [1, 2, 3])
def test_the_blur_of_a_tiny_image_is_a_mean_of_what_is_there(side: int, path: Path_) -> None:
    tiny = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8)
    sharp = reference.adjust_hue(tiny / 255, 0.1)
    blurred = augmented(path, tiny, parameters(sigma=1.4, order=0, hue=0.1)[:1])
    assert (blurred >= sharp.amin((2, 3), keepdim=True) - 1e-3).all()
    assert (blurred <= sharp.amax((2, 3), keepdim=True) + 1e-3).all()


def loader(shards: Path, batch: int, seed: int = 0, global_views: int = 2, local_views: int = 2) -> Loader:
    views = Views(
        global_=ViewGroup(count=global_views, size=24, scale=(0.5, 1.0)),
        local=ViewGroup(count=local_views, size=16, scale=(0.2, 0.5)),
    )
    data = Data(shards=str(shards), views=views)
    return Loader(open_mixture(data), data, BatchPlan(micro_batch=batch), seed=seed)


def loaded(shards: Path, steps: int = 1, **options: int) -> list[Batch]:
    return list(islice(loader(shards, 16, **options), steps))


def test_a_further_view_changes_no_other(scenes: Path) -> None:
    (plain,) = loaded(scenes)
    (more_local,) = loaded(scenes, local_views=3)
    (more_global,) = loaded(scenes, global_views=3)
    for other in (more_local, more_global):
        assert other.keys == plain.keys
        for group in (0, 1):
            assert other.views[group][:2].equal(plain.views[group])
            assert other.parameters[group][:2].equal(plain.parameters[group])
    assert len(more_local.views[1]) == len(more_global.views[0]) == 3


def test_every_sample_view_epoch_and_seed_has_its_own_colours(scenes: Path) -> None:
    epochs = [*loaded(scenes, steps=12), *loaded(scenes, seed=1, steps=6)]
    factors = torch.cat([p[..., ours.BRIGHTNESS].flatten() for batch in epochs for p in batch.parameters])
    assert len(factors) == 18 * 16 * 4
    assert len(factors.unique()) > 0.999 * len(factors)  # float32 may meet by chance


@pytest.mark.parametrize("leak", [False, True])
def test_loading_holds_on_to_nothing(leak: bool, scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's and numpy's allocations and the live tensors, after two epochs more and after six: nothing stays. Of a leak
    of 100 numbers per view, the test sees 1 MB."""
    kept: list[np.ndarray] = []
    if leak:
        resized = geometry._resized
        monkeypatch.setattr(geometry, "_resized", lambda *a: kept.append(np.zeros(100)) or resized(*a))
    batches = iter(loader(scenes, 32))

    def epochs(count: int) -> tuple[int, int]:
        for _ in range(3 * count):
            next(batches)
        gc.collect()
        return tracemalloc.get_traced_memory()[0], sum(type(x) is torch.Tensor for x in gc.get_objects())

    tracemalloc.start()
    try:
        first, second = epochs(2), epochs(4)
    finally:
        tracemalloc.stop()
    assert (second[0] - first[0] > 100_000 or second[1] > first[1]) == leak


def test_views_made_ahead_are_the_same(scenes: Path) -> None:
    (batch,) = loaded(scenes)
    cpu = torch.device("cpu")
    views = batch.augmented(cpu)
    early = replace(batch, ready=lambda: views)
    assert early.augmented(cpu) is views
    assert all(a.equal(b) for a, b in zip(views, batch.augmented(cpu), strict=True))


@on_a_gpu
def test_on_a_gpu_views_made_ahead_are_those_of_the_cpu(scenes: Path) -> None:
    batches = loaded(scenes, steps=4)
    device = torch.device("cuda")
    beside = Beside(device)
    for batch in batches:
        early = beside.begin(batch)
        for mine, theirs in zip(early.augmented(device), batch.augmented(torch.device("cpu")), strict=True):
            torch.testing.assert_close(mine.cpu(), theirs, atol=1e-3, rtol=0)
