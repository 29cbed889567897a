"""Principal components as colours, the foreground, and maps finer than patches, against scikit-learn, OpenCV and NumPy."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
import timm
import torch
from sklearn.decomposition import PCA

from lejepa_scale.errors import UserError
from lejepa_scale.evaluation import pca
from lejepa_scale.evaluation.pca import components, foreground, foreground_colours, otsu, pca_maps, shared_colours
from lejepa_scale.evaluation.pictures.maps import dense_features, finer_for, patch_map, stride_of
from lejepa_scale.model import Encoder


def rows_of(count: int, width: int) -> torch.Tensor:
    """With variances that differ."""
    return torch.randn(count, width) @ torch.diag(torch.linspace(3, 0.1, width)) @ torch.randn(width, width) + 5


@pytest.mark.parametrize(("count", "width"), [(300, 12), (20, 64)])
def test_components_are_scikit_learns(count: int, width: int) -> None:
    """Of more rows than columns, and of fewer."""
    rows = rows_of(count, width)
    found, expected = components(rows, 4), PCA(4, svd_solver="full").fit(rows.double().numpy())
    signs = np.sign((found.axes.double().numpy() * expected.components_).sum(1))
    np.testing.assert_allclose(found.axes.numpy(), signs[:, None] * expected.components_, atol=1e-4)
    np.testing.assert_allclose(found.shares.numpy(), expected.explained_variance_ratio_, rtol=1e-4)
    largest = found.axes.abs().argmax(1, keepdim=True)
    assert (found.axes.gather(1, largest) > 0).all()
    projected = found.project(rows).numpy()
    np.testing.assert_allclose(projected, signs * expected.transform(rows.double().numpy()), atol=1e-3)
    assert found.varies


def test_components_of_many_rows_are_those_of_some() -> None:
    rows = rows_of(3 * pca._MOST_ROWS, 8)
    found, expected = components(rows), PCA(3).fit(rows.double().numpy())
    cosines = np.abs((found.axes.double().numpy() * expected.components_).sum(1))
    assert cosines.min() > 0.999
    assert torch.equal(found.axes, components(rows).axes)


def test_there_may_be_fewer_components_than_colours() -> None:
    two = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    found = components(two)
    assert found.axes.shape == (3, 2)
    torch.testing.assert_close(found.axes[0], torch.tensor([1.0, 3.0]) / 10**0.5)
    assert (found.axes[1:] == 0).all()
    assert found.shares.tolist() == pytest.approx([1, 0, 0])
    (coloured,), _ = shared_colours([two.view(1, 2, 2)])
    assert coloured[0].tolist() == [[0, 0.5, 0.5], [1, 0.5, 0.5]]


def test_a_collapsed_encoder_has_one_colour() -> None:
    """Rounding is not stretched over all colours."""
    features = torch.full((2, 8, 8, 16), 3.0) + 1e-7 * torch.randn(2, 8, 8, 16)
    assert (pca_maps(features) == 0.5).all()
    assert not components(features.flatten(0, 2)).varies


def test_features_that_are_not_finite_have_no_colours() -> None:
    with pytest.raises(UserError, match="not finite"):
        pca_maps(torch.full((1, 2, 2, 3), torch.nan))


def test_pca_finds_the_directions_of_variance() -> None:
    axes, _ = torch.linalg.qr(torch.randn(16, 16))
    strengths = torch.tensor([9.0, 5.0, 3.0] + [0.01] * 13)
    latent = torch.randn(2, 20, 20, 16) * strengths
    maps = pca_maps(latent @ axes.T).flatten(0, 2)
    for i in range(3):
        inside = latent.flatten(0, 2)[:, i]
        assert abs(torch.corrcoef(torch.stack([maps[:, i], inside]))[0, 1]) > 0.95


def test_maps_of_several_shapes_share_their_colours() -> None:
    """A feature has one colour, wherever it stands."""
    palette = torch.randn(5, 12)
    places = [torch.randint(0, 5, (6, 9)), torch.randint(0, 5, (4, 3))]
    coloured, _ = shared_colours([palette[index] for index in places])
    assert [tuple(x.shape) for x in coloured] == [(6, 9, 3), (4, 3, 3)]
    for number in range(5):
        alike = torch.cat([x[index == number] for x, index in zip(coloured, places, strict=True)])
        torch.testing.assert_close(alike, alike[:1].expand_as(alike), atol=1e-5, rtol=0)


# -- foreground


def objects(turn: float = 1.0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Maps of features with an object inside, and where it is. turn: -1 turns the first component around."""
    apart = torch.zeros(10)
    apart[0] = 10
    masks, maps = [], []
    for height, width in ((16, 16), (12, 20)):
        mask = torch.zeros(height, width, dtype=torch.bool)
        mask[4 : height - 3, 3 : width - 5] = True
        masks.append(mask)
        maps.append(turn * (torch.randn(height, width, 10) + mask[..., None] * apart))
    return maps, masks


@pytest.mark.parametrize("turn", [1.0, -1.0])
def test_the_foreground_is_what_differs_from_the_border(turn: float) -> None:
    maps, masks = objects(turn)
    found = foreground(maps)
    assert found.why_not == ""
    for mask, expected in zip(found.masks, masks, strict=True):
        assert torch.equal(mask, expected)
    inside = foreground_colours(maps, found.masks)
    rows = torch.cat([x[mask] for x, mask in zip(maps, masks, strict=True)])
    expected_colours = pca.colours(components(rows).project(rows), 1.0)  # of the foreground alone
    torch.testing.assert_close(torch.cat([x[m] for x, m in zip(inside, masks, strict=True)]), expected_colours)
    assert all(x[~mask].isnan().all() for x, mask in zip(inside, masks, strict=True))


@pytest.mark.parametrize(
    ("kind", "why"),
    [("noise", "no two sides"), ("sides", "of the border"), ("flat", "no patch"), ("tiny", "too small")],
)
def test_there_is_no_foreground_where_none_can_be_told(kind: str, why: str) -> None:
    left = torch.zeros(16, 16, 10)
    left[:, :8, 0] = 10  # the left half differs from the right one
    maps = {
        "noise": [torch.randn(16, 16, 10)],
        "sides": [left + torch.randn(16, 16, 10)],
        "flat": [torch.ones(16, 16, 10)],
        "tiny": [torch.randn(2, 2, 10)],
    }[kind]
    found = foreground(maps)
    assert found.masks == []
    assert why in found.why_not


def test_a_given_threshold_is_taken() -> None:
    maps = [torch.randn(16, 16, 10) * torch.tensor([9.0] + [1.0] * 9)]
    shares = [float(foreground(maps, at).masks[0].float().mean()) for at in (0.2, 0.5, 0.8)]
    assert shares[0] > shares[1] > shares[2] > 0
    assert foreground(maps).why_not
    scaled = pca.colours(components(maps[0].flatten(0, 1), 1).project(maps[0]).flatten(0, 1), 1.0).view(16, 16)
    assert torch.equal(foreground(maps, 0.8).masks[0], scaled > 0.8) or torch.equal(
        foreground(maps, 0.8).masks[0], 1 - scaled > 0.8
    )


def test_the_threshold_is_otsus() -> None:
    """OpenCV's, of 8 bits; and the share of the variance between the sides, 2 / pi for a normal distribution."""
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0.3, 0.08, 700), rng.normal(0.75, 0.05, 300)]).clip(0, 0.999)
    levels = (values * 256).astype(np.uint8)
    expected, _ = cv2.threshold(levels, 0, 255, cv2.THRESH_OTSU)
    found, separation = otsu(torch.from_numpy(values).float())
    assert found == pytest.approx((expected + 1) / 256, abs=1.5 / 256)
    sides = levels > expected
    between = sides.mean() * (1 - sides.mean()) * (levels[sides].mean() - levels[~sides].mean()) ** 2
    assert separation == pytest.approx(between / levels.var(), abs=1e-3)
    normal = torch.from_numpy(rng.normal(0.5, 0.1, 100_000).clip(0, 1)).float()
    assert otsu(normal)[1] == pytest.approx(2 / np.pi, abs=5e-3)


# -- maps


def model_of(name: str, side: int) -> Any:
    encoder = Encoder(name, image_size=side, options={"depth": 1} if name == "vit_nano" else {}).eval()
    model = timm.create_model(**encoder.timm_arguments).eval()
    model.load_state_dict(encoder.backbone.state_dict())
    images = torch.randn(1, 3, side, side)
    torch.testing.assert_close(patch_map(model, images), encoder.patch_features(images), atol=1e-4, rtol=1e-4)
    return model


@pytest.mark.parametrize(("name", "stride"), [("vit_nano", 8), ("resnet10t", 32)])
def test_finer_maps_are_those_of_moved_images(name: str, stride: int) -> None:
    """Of images that are not square: with one shift the plain map; with more, each place is that of an image that NumPy has
    moved by parts of a patch."""
    model = model_of(name, 64)
    assert stride_of(model) == (stride, stride)
    images = torch.randn(2, 3, 64, 96)
    plain = patch_map(model, images)
    assert plain.shape[1:3] == (64 // stride, 96 // stride)
    torch.testing.assert_close(dense_features(model, images, 1), plain)
    finer = dense_features(model, images, 4)
    assert finer.shape == (2, 4 * plain.shape[1], 4 * plain.shape[2], plain.shape[3])
    half = stride // 2
    padded = np.pad(images.numpy(), [(0, 0), (0, 0), (half, half), (half, half)], mode="reflect")
    for i, j in ((0, 3), (2, 1)):  # the centres of the quarters lie at -3/8, -1/8, 1/8 and 3/8 of a patch
        top, left = (half + round((k - 1.5) * stride / 4) for k in (i, j))
        moved = torch.from_numpy(padded[..., top : top + 64, left : left + 96].copy())
        torch.testing.assert_close(finer[:, i::4, j::4], patch_map(model, moved), atol=1e-4, rtol=1e-4)


def test_small_maps_are_made_finer() -> None:
    assert [finer_for(*size) for size in ((32, 40), (28, 28), (14, 20), (16, 16), (2, 3))] == [1, 1, 2, 2, 8]
