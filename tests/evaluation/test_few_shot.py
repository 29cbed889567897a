"""Few-shot classification: what is drawn, and both classifiers against scikit-learn."""

from __future__ import annotations

import logging
import statistics
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blobs import blobs
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.neighbors import NearestCentroid

from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.features import Features
from lejepa_scale.evaluation.few_shot import drawn, few_shot, summary

TRAIN, TEST = blobs(400, 1, spread=1.0), blobs(300, 2, spread=1.0)


def test_a_draw_has_so_many_images_of_every_class() -> None:
    labels = torch.cat([torch.full((n,), 3 * c) for c, n in enumerate((2, 30, 150, 1000))])[torch.randperm(1182)]
    for shot, counts in {1: [1, 1, 1, 1], 10: [2, 10, 10, 10], 0.01: [1, 1, 2, 10], 0.1: [1, 3, 15, 100]}.items():
        index = drawn(labels, shot, 0, 0)
        assert labels[index].unique(return_counts=True)[1].tolist() == counts
        assert index.tolist() == sorted(set(index.tolist()))


def test_a_draw_follows_from_its_seed_shot_and_number() -> None:
    first = drawn(TRAIN.labels, 5, 2, 7).tolist()
    assert drawn(TRAIN.labels, 5, 2, 7).tolist() == first
    others = [drawn(TRAIN.labels, *which).tolist() for which in ((5, 1, 7), (5, 2, 8), (4, 2, 7))]
    assert first not in others
    assert not set(others[2]) <= set(first)  # another shot, another draw
    assert first[:6] == [15, 23, 42, 56, 59, 66]  # in any process, on any day
    found = few_shot(TRAIN, TEST, shots=[5], draws=3, classifier="centroid")[5]
    among = few_shot(TRAIN, TEST, shots=[0.1, 1, 5], draws=2, classifier="centroid")
    assert list(among) == [0.1, 1, 5]
    for one, other in zip(found[:2], among[5], strict=True):
        assert one.ranked.equal(other.ranked)
        assert one.settings == other.settings
    assert not found[0].ranked.equal(found[1].ranked)
    assert found[1].settings == {"shot": 5, "draw": 1, "seed": 0, "images": 30, "classifier": "centroid"}


def unit(features: Features) -> Any:
    return F.normalize(features.rows.double(), dim=1).numpy()


@pytest.mark.parametrize("shot", [2, 5, 0.5])
def test_the_nearest_mean_is_scikit_learns(shot: int | float) -> None:
    for draw, guesses in enumerate(few_shot(TRAIN, TEST, shots=[shot], draws=2, classifier="centroid")[shot]):
        index = drawn(TRAIN.labels, shot, draw, 0)
        theirs = NearestCentroid().fit(unit(TRAIN)[index], TRAIN.labels[index].numpy())
        assert guesses.ranked[:, 0].tolist() == theirs.predict(unit(TEST)).tolist()
        order = torch.from_numpy(euclidean_distances(unit(TEST), theirs.centroids_)).argsort(1)[:, :5]
        assert guesses.ranked.tolist() == torch.from_numpy(theirs.classes_)[order].tolist()


@pytest.mark.parametrize("shot", [1, 10])
def test_logistic_regression_is_scikit_learns(shot: int) -> None:
    for draw, guesses in enumerate(few_shot(TRAIN, TEST, shots=[shot], draws=2)[shot]):
        index = drawn(TRAIN.labels, shot, draw, 0)
        strength = guesses.settings["strength"]
        assert (strength == 1.0 and guesses.settings["held_out_rows"] == 0) if shot == 1 else strength in (
            0.01, 0.1, 1, 10, 100, 1000,
        )  # fmt: skip
        theirs = LogisticRegression(C=strength, tol=1e-8, max_iter=10_000).fit(
            unit(TRAIN)[index], TRAIN.labels[index].numpy()
        )
        agree = torch.from_numpy(theirs.predict(unit(TEST))) == guesses.ranked[:, 0]
        assert agree.double().mean() > 0.996


def test_more_shots_are_better_and_summed_up() -> None:
    for classifier in ("logistic", "centroid"):
        found = few_shot(TRAIN, TEST, shots=[1, 20], draws=4, classifier=classifier)  # type: ignore[arg-type]
        tops = {s: [float((g.ranked[:, 0] == TEST.labels).double().mean()) for g in gs] for s, gs in found.items()}
        numbers = summary(found, TEST.labels, 12)
        for shot in (1, 20):
            assert numbers[shot]["mean"] == pytest.approx(statistics.fmean(tops[shot]))
            assert numbers[shot]["std"] == pytest.approx(statistics.stdev(tops[shot]))
            assert numbers[shot]["draws"] == 4
        assert numbers[20]["mean"] > numbers[1]["mean"] + 0.05  # type: ignore[operator]
    assert summary({1: found[1][:1]}, TEST.labels, 12)[1]["std"] is None


def test_shots_that_are_not_there(caplog: pytest.LogCaptureFixture) -> None:
    few = Features(TRAIN.rows[:40], torch.arange(40) % 10 // 3)  # 12, 12, 12 and 4 images
    test = Features(TEST.rows, TEST.labels % 4)
    assert list(few_shot(few, test, draws=1, classifier="centroid")) == [1, 5, 10, 0.01, 0.1]
    assert list(few_shot(Features(few.rows[:20], few.labels[:20]), test, draws=1, classifier="centroid")) == [
        1,
        5,
        0.01,
        0.1,
    ]
    with caplog.at_level(logging.WARNING):
        found = few_shot(few, test, shots=[10], draws=1, classifier="centroid")
    assert found[10][0].settings["images"] == 34
    assert "1 of 4 classes have fewer than 10 images" in caplog.text
    for shot, message in {
        13: "shot 13 .* from 1 to the 12 of the largest",
        0: "shot 0",
        1.0: r"shot 1\.0 is a share",
        -0.1: "share",
    }.items():
        with pytest.raises(UserError, match=message):
            few_shot(few, test, shots=[shot])
    with pytest.raises(UserError, match="at least one shot"):
        few_shot(few, test, shots=[])
    with pytest.raises(UserError, match="draws=0"):
        few_shot(few, test, draws=0)
    with pytest.raises(UserError, match="widths"):
        few_shot(few, Features(test.rows[:, 1:], test.labels))


def test_an_end_of_the_grid_is_said_once_a_shot(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = few_shot(TRAIN, TEST, shots=[5], draws=4)[5]
    ends = sum(g.settings["strength"] in (0.01, 1000) for g in found)
    assert ends  # so few are separable: every strength is as good, the smallest is taken
    assert [record.getMessage() for record in caplog.records] == [
        f"shot 5: the best C was at the end of its grid in {ends} of 4 draws."
    ]
