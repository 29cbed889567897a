"""Scores of frozen features against scikit-learn, timm and NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import torchvision.transforms.v2.functional as reference
from scipy import stats
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from lejepa_scale.evaluation import Features, extract, isotropy, knn_accuracy, linear_accuracy, raw_pixels, score
from lejepa_scale.evaluation.isotropy import first_four_moments
from lejepa_scale.evaluation.pca import pca_maps
from lejepa_scale.evaluation.spectrum import effective_rank
from lejepa_scale.model import Encoder
from lejepa_scale.objective import SIGReg

IMAGENET = list(timm.data.IMAGENET_DEFAULT_MEAN), list(timm.data.IMAGENET_DEFAULT_STD)
GRID = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)


def blobs(count: int, seed: int, spread: float, classes: int = 6, width: int = 10) -> Features:
    """Overlapping classes of unequal size, off the origin and with rows of unequal length."""
    centres = np.random.default_rng(99).normal(size=(classes, width)) + 0.5
    rng = np.random.default_rng(seed)
    labels = np.minimum(rng.integers(0, classes, count), rng.integers(0, classes, count))
    rows = (centres[labels] + spread * rng.normal(size=(count, width))) * rng.uniform(0.2, 3, (count, 1))
    return Features(torch.from_numpy(rows).float(), torch.from_numpy(labels))


def of_scikit_learn(train: Features, test: Features, k: int, temperature: float) -> float:
    model = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    )
    model.fit(train.rows.double().numpy(), train.labels.numpy())
    return float(model.score(test.rows.double().numpy(), test.labels.numpy()))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"k": 3}, {"k": 50, "temperature": 0.5}])
def test_nearest_neighbours_are_scikit_learns(options: dict, seed: int) -> None:
    """Cosine, 20 neighbours and a temperature of 0.07 by default."""
    train, test = blobs(250, 10 + seed, 1.0), blobs(300, 20 + seed, 1.0)
    expected = of_scikit_learn(train, test, **{"k": 20, "temperature": 0.07, **options})
    assert 0.4 < expected < 0.95
    assert knn_accuracy(train, test, **options) == pytest.approx(expected, abs=1e-9)


def test_the_table_scores_twenty_neighbours() -> None:
    train, test = blobs(250, 1, 1.0), blobs(300, 2, 1.0)
    row = score("x", train, test)
    assert row.knn == pytest.approx(of_scikit_learn(train, test, 20, 0.07))
    assert (row.width, row.effective_rank) == (10, pytest.approx(rank_me(test.rows.double().numpy())))


def logistic(rows: np.ndarray, labels: np.ndarray, penalty: float) -> LogisticRegression:
    """scikit-learn minimizes |w|^2 / 2 + C sum of losses; ours is the mean loss + penalty |w|^2."""
    return LogisticRegression(C=1 / (2 * len(rows) * penalty), solver="newton-cholesky", tol=1e-6).fit(rows, labels)


@pytest.mark.parametrize(("count", "spread", "width"), [(60, 1.5, 40), (120, 1.2, 12)])
def test_the_linear_probe_is_scikit_learns(count: int, spread: float, width: int) -> None:
    """Standardized features, the penalty that is best on every tenth training row (the strongest of equals), and a fit on
    all rows with it."""
    train, test = blobs(count, 5, spread, 4, width), blobs(500, 6, spread, 4, width)
    scaler = StandardScaler().fit(train.rows.double().numpy())
    factor = (1 - 1 / count) ** 0.5  # torch's deviation is that of a sample
    rows, test_rows = (factor * scaler.transform(f.rows.double().numpy()) for f in (train, test))
    labels = train.labels.numpy()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).numpy()
    held, kept = order[::10], np.delete(order, np.s_[::10])
    scores = [logistic(rows[kept], labels[kept], p).score(rows[held], labels[held]) for p in GRID]
    penalty = GRID[int(np.argmax(scores))]
    expected = logistic(rows, labels, penalty).score(test_rows, test.labels.numpy())
    accuracy, chosen = linear_accuracy(train, test)
    assert chosen == penalty
    assert accuracy == pytest.approx(expected, abs=1.5 / 500)  # one row on the border, in fp32


def rank_me(rows: np.ndarray) -> float:
    """RankMe (arXiv 2210.02885): exp of the entropy of singular values over their sum; of centred rows here."""
    values = np.linalg.svd(rows - rows.mean(0), compute_uv=False)
    p = values / values.sum()
    return float(np.exp(-np.sum(p * np.log(np.maximum(p, 1e-30)))))


def test_effective_rank_is_rank_me() -> None:
    rows = np.random.default_rng(0).normal(size=(200, 12)) * np.geomspace(1, 0.01, 12) + 3
    assert effective_rank(torch.from_numpy(rows)) == pytest.approx(rank_me(rows), rel=1e-6)
    orthogonal = torch.cat([torch.diag(torch.tensor([4.0, 2.0, 2.0])), -torch.diag(torch.tensor([4.0, 2.0, 2.0]))])
    assert effective_rank(orthogonal) == pytest.approx(2**1.5)  # shares 1/2, 1/4, 1/4: 3/2 bits


def test_colours_are_principal_components_between_percentiles() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, 9, 7, 8)) @ (rng.normal(size=(8, 8)) * np.geomspace(8, 0.1, 8)[:, None]) + 5
    rows = features.reshape(-1, 8)
    model = PCA(3).fit(rows)
    axes = model.components_
    axes = axes * np.sign(axes[np.arange(3), np.abs(axes).argmax(1)])[:, None]
    projected = (rows - rows.mean(0)) @ axes.T
    low, high = np.percentile(projected, [2, 98], axis=0)
    expected = np.clip((projected - low) / (high - low), 0, 1).reshape(2, 9, 7, 3)
    np.testing.assert_allclose(pca_maps(torch.from_numpy(features)).numpy(), expected, atol=1e-4)


def test_extracted_features_are_timms_in_evaluation_mode() -> None:
    encoder = Encoder("vit_nano", image_size=32, drop_path=0.9, drop_path_uniform=True, options={"depth": 2}).train()
    plain = timm.create_model(**{**encoder.timm_arguments, "drop_path_rate": 0.0}).eval()
    plain.load_state_dict(encoder.backbone.state_dict())
    images, labels = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8), torch.arange(7)
    found = extract(encoder, [(images[:4], labels[:4]), (images[4:], labels[4:])], torch.device("cpu"))
    with torch.no_grad():
        expected = plain(reference.normalize(images / 255, *IMAGENET))
    torch.testing.assert_close(found.rows, expected, rtol=1e-4, atol=1e-5)
    assert found.labels.tolist() == list(range(7))


def test_raw_pixels_are_means_on_a_grid_of_32() -> None:
    images = torch.randint(0, 256, (3, 3, 96, 96), dtype=torch.uint8)
    means = images.double().numpy().reshape(3, 3, 32, 3, 32, 3).mean((3, 5)) / 255
    mean, std = (np.array(v)[:, None, None] for v in IMAGENET)
    rows = raw_pixels([(images, torch.zeros(3, dtype=torch.long))]).rows
    np.testing.assert_allclose(rows.numpy(), ((means - mean) / std).reshape(3, -1), atol=1e-5)


def test_the_first_four_moments_are_weighted_by_their_variances() -> None:
    """Of x^k at N(0, 1), from SciPy's moments: E x^2k - (E x^k)^2."""
    x = np.random.default_rng(0).gamma(2.0, size=(50, 3)) - 1
    expected = np.zeros(3)
    for k in range(1, 5):
        mean = stats.norm.moment(k)
        expected += 50 * ((x**k).mean(0) - mean) ** 2 / (stats.norm.moment(2 * k) - mean**2)
    np.testing.assert_allclose(first_four_moments(torch.from_numpy(x)).numpy(), expected, rtol=1e-12)


def test_isotropy_divides_by_one_number() -> None:
    """SciPy's statistic along the same directions, of rows that are centred and divided by the root of their mean square."""
    rows = np.random.default_rng(0).normal(size=(300, 6)) * np.linspace(1, 9, 6) + 3
    centred = rows - rows.mean(0)
    directions = SIGReg(num_slices=256).directions(0, 6, torch.device("cpu"), torch.float64).numpy()
    projected = centred / np.sqrt((centred**2).mean()) @ directions.T
    values = [stats.cramervonmises(column, "norm").statistic for column in projected.T]
    found = {row.name: row for row in isotropy(torch.from_numpy(rows))}["Cramer-von Mises"]
    assert (found.mean, found.worst) == pytest.approx((np.mean(values), np.max(values)), rel=1e-9)
