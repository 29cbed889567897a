"""Scores of frozen features against brute force and against known answers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lejepa_scale.data import evaluation_batches
from lejepa_scale.data.images.pixels import MEAN, STD
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation import Features, as_table, extract, knn_accuracy, linear_accuracy, raw_pixels, score
from lejepa_scale.evaluation.pca import dense_features, pca_maps
from lejepa_scale.evaluation.spectrum import effective_rank
from lejepa_scale.model import Encoder


def clusters(count: int, spread: float, seed: int, classes: int = 4, width: int = 12) -> Features:
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return Features(centres[labels] + spread * torch.randn(count, width, generator=generator), labels)


def brute_force_knn(train: Features, test: Features, k: int) -> float:
    hits = 0
    for row, label in zip(test.rows.double(), test.labels, strict=True):
        cosines = [float(row @ other / (row.norm() * other.norm())) for other in train.rows.double()]
        nearest = sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]
        votes: dict[int, float] = {}
        for i in nearest:
            vote = math.exp(cosines[i] / 0.07)
            votes[int(train.labels[i])] = votes.get(int(train.labels[i]), 0.0) + vote
        hits += max(votes, key=lambda c: votes[c]) == int(label)
    return hits / len(test.rows)


@pytest.mark.parametrize("k", [1, 7, 500])
def test_knn_equals_brute_force(k: int) -> None:
    train, test = clusters(150, 1.2, 1), clusters(60, 1.2, 2)
    expected = brute_force_knn(train, test, k)
    assert 0.3 < expected < 1.0  # neither chance nor perfect, or the comparison shows nothing
    assert knn_accuracy(train, test, k=k, chunk=17) == pytest.approx(expected)


def test_linear_probe_separates_what_a_line_separates() -> None:
    easy = linear_accuracy(clusters(400, 0.2, 1), clusters(200, 0.2, 2))
    assert easy[0] == 1.0
    shuffled = clusters(400, 0.2, 1)
    shuffled = Features(shuffled.rows, shuffled.labels[torch.randperm(400)])
    assert linear_accuracy(shuffled, clusters(400, 0.2, 2))[0] < 0.6
    # a feature that differs in scale by 1e4 is worth as much as any other
    scaled = [
        Features(f.rows * torch.logspace(-2, 2, 12), f.labels) for f in (clusters(400, 1.0, 1), clusters(200, 1.0, 2))
    ]
    plain = linear_accuracy(clusters(400, 1.0, 1), clusters(200, 1.0, 2))
    assert linear_accuracy(*scaled)[0] == pytest.approx(plain[0], abs=0.011)


def test_effective_rank_of_known_spectra() -> None:
    rows = torch.randn(4000, 10)
    assert effective_rank(rows) == pytest.approx(10, rel=0.01)
    assert effective_rank(rows[:, :1] @ torch.randn(1, 10)) == pytest.approx(1, abs=1e-3)
    assert effective_rank(rows + 100) == pytest.approx(10, rel=0.01)  # centred
    assert math.isnan(effective_rank(rows * torch.inf))


def test_extraction_and_table(scenes: Path) -> None:
    encoder = Encoder("vit_nano", image_size=32, options={"depth": 1}).eval()
    batches = list(evaluation_batches([str(scenes)], image_size=32, batch_size=40))
    features = extract(encoder, batches, torch.device("cpu"))
    assert features.rows.shape == (96, 128)
    assert features.labels.tolist() == [i % 10 for i in range(96)]
    pixels = raw_pixels(batches, side=8)
    assert pixels.rows.shape == (96, 3 * 64)
    patch = float(batches[0][0][5, 1, 8:12, 12:16].float().mean() / 255)
    assert pixels.rows[5].view(3, 8, 8)[1, 2, 3] == pytest.approx((patch - MEAN[1]) / STD[1], abs=1e-5)
    text = as_table([score("trained", features, features, 1)])
    assert "100.0%" in text  # each image is its own nearest neighbour
    assert "k-NN" in text


def test_images_without_labels_are_refused() -> None:
    with pytest.raises(UserError, match="1 of 2 evaluation images have no label"):
        Features(torch.randn(2, 3), torch.tensor([0, -1]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_no_numbers_are_refused(value: float) -> None:
    with pytest.raises(UserError, match="features of 1 of 2 images are not finite"):
        Features(torch.tensor([[1.0, value], [0.0, 1.0]]), torch.tensor([0, 1]))


@pytest.mark.parametrize("name", ["vit_nano", "resnet10t"])
def test_dense_features_hold_the_encoders_own_grid(name: str) -> None:
    """With one shift: the plain map. With more: as many finer, and an image moved by a patch moves the map."""
    encoder = Encoder(name, image_size=64).eval()
    images = torch.randn(2, 3, 64, 64)
    plain = encoder.patch_features(images)
    assert torch.allclose(dense_features(encoder, images, 1), plain, atol=1e-5)
    finer = dense_features(encoder, images, 4)
    assert finer.shape == (2, 4 * plain.shape[1], 4 * plain.shape[2], plain.shape[3])
    assert not torch.allclose(finer[:, ::4, ::4], finer[:, 1::4, ::4])
    maps = pca_maps(finer)
    assert maps.shape == (*finer.shape[:3], 3)
    assert 0 <= float(maps.min()) < 0.05
    assert 0.95 < float(maps.max()) <= 1


def test_pca_finds_the_directions_of_variance() -> None:
    axes, _ = torch.linalg.qr(torch.randn(16, 16))
    strengths = torch.tensor([9.0, 5.0, 3.0] + [0.01] * 13)
    latent = torch.randn(2, 20, 20, 16) * strengths
    maps = pca_maps(latent @ axes.T).flatten(0, 2)
    for i in range(3):
        inside = latent.flatten(0, 2)[:, i]
        assert abs(torch.corrcoef(torch.stack([maps[:, i], inside]))[0, 1]) > 0.95
