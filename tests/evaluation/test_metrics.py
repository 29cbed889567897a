"""Metrics against scikit-learn and scipy, and the sets that no protocol can be run on."""

from __future__ import annotations

import logging

import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, top_k_accuracy_score

from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.features import Features
from lejepa_scale.evaluation.metrics import Guesses, classes_of, join, likeliest, measure, part_of, wilson


def scored(count: int = 300, classes: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(0, classes - 1, (count,)) ** 2 % classes  # unequal, and some classes without an image
    return torch.randn(count, classes) + 1.5 * torch.eye(classes)[labels], labels


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_metrics_equal_scikit_learns() -> None:
    scores, labels = scored()
    found = measure(Guesses(likeliest(scores, torch.arange(9)), {}), labels, 9)
    guessed = scores.argmax(1).numpy()
    assert found.confusion.tolist() == confusion_matrix(labels, guessed, labels=range(9)).tolist()
    assert found.mean_per_class == pytest.approx(balanced_accuracy_score(labels, guessed), abs=1e-12)
    assert found.top1 == pytest.approx(top_k_accuracy_score(labels, scores, k=1, labels=range(9)), abs=1e-12)
    assert found.top5 == pytest.approx(top_k_accuracy_score(labels, scores, k=5, labels=range(9)), abs=1e-12)
    assert found.count == 300
    assert 0.2 < found.top1 < found.top5 < 1
    assert abs(found.mean_per_class - found.top1) > 1e-3
    assert (found.low, found.high) == wilson(round(found.top1 * 300), 300)


def test_top5_of_five_classes_says_nothing() -> None:
    scores, labels = scored(classes=5)
    assert measure(Guesses(likeliest(scores, torch.arange(5)), {}), labels, 5).top5 == 1.0


@pytest.mark.parametrize(("hits", "n"), [(0, 7), (7, 7), (1, 1), (30, 41), (999, 1000), (49_123, 50_000)])
def test_wilson_interval_equals_scipys(hits: int, n: int) -> None:
    expected = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert wilson(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
    low, high = wilson(hits, n)
    assert 0 <= low <= hits / n <= high <= 1


def test_equal_scores_go_to_the_smaller_class() -> None:
    scores = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0]])
    classes = torch.tensor([2, 3, 5, 7, 11, 13, 17])
    assert likeliest(scores, classes).tolist() == [[3, 5, 11, 2, 7]]
    assert likeliest(torch.zeros(3, 20_000), torch.arange(20_000)).tolist() == 3 * [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 11])
def test_parts_are_the_whole_in_order(world: int) -> None:
    parts = [part_of(10, (rank, world)) for rank in range(world)]
    assert [i for part in parts for i in part] == list(range(10))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    ranked = torch.randint(0, 9, (10, 5))
    assert join([Guesses(ranked[part.start : part.stop], {"k": 1}) for part in parts]).ranked.equal(ranked)


def test_parts_that_do_not_belong_together_are_refused() -> None:
    for share in ((1, 1), (-1, 2), (0, 0)):
        with pytest.raises(UserError, match=r"0 <= rank < world; got \("):
            part_of(10, share)
    one, other = (Guesses(torch.zeros(1, 1, dtype=torch.long), {"k": k}) for k in (1, 2))
    with pytest.raises(UserError, match="other settings"):
        join([one, other])
    with pytest.raises(UserError, match="no parts"):
        join([])


def test_what_cannot_be_measured_is_refused() -> None:
    ranked = torch.tensor([[0, 1], [1, 0]])
    with pytest.raises(UserError, match="0 images"):
        measure(Guesses(ranked[:0], {}), torch.tensor([], dtype=torch.long), 2)
    with pytest.raises(UserError, match=r"classes lie in 0\.\.5; 2 classes"):
        measure(Guesses(ranked, {}), torch.tensor([0, 5]), 2)
    with pytest.raises(UserError, match="3 hits of 2"):
        wilson(3, 2)
    with pytest.raises(UserError, match="0 hits of 0"):
        wilson(0, 0)


@pytest.mark.unchecked
def test_guesses_of_other_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"guesses of 2 images .* 3 labels"):
        measure(Guesses(torch.tensor([[0], [1]]), {}), torch.tensor([0, 1, 1]), 2)


def features(count: int, width: int = 3, classes: int = 4) -> Features:
    return Features(torch.randn(count, width), torch.arange(count) % classes)


def test_sets_that_no_protocol_can_be_run_on_are_refused() -> None:
    assert classes_of(features(8), features(4)).tolist() == [0, 1, 2, 3]
    with pytest.raises(UserError, match="the test set has 0 images"):
        classes_of(features(8), features(0))
    with pytest.raises(UserError, match="the training set has 0 images"):
        classes_of(features(0), features(8))
    with pytest.raises(UserError, match="training 3 and test 5"):
        classes_of(features(8), features(8, width=5))
    with pytest.raises(UserError, match=r"all 8 images .* class 0"):
        classes_of(features(8, classes=1), features(8))


@pytest.mark.unchecked
def test_several_labels_an_image_are_refused() -> None:
    several = Features(torch.randn(4, 3), torch.ones(4, 2, dtype=torch.long))
    with pytest.raises(UserError, match=r"the test set have shape \[4, 2\].*multi-label.*not supported"):
        classes_of(features(8), several)
    with pytest.raises(UserError, match="the test set has 4 rows and 3 labels"):
        classes_of(features(8), Features(torch.randn(4, 3), torch.tensor([0, 1, 2])))


def test_images_of_unknown_classes_are_counted_aloud(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        classes_of(features(8), features(12, classes=6))
    assert "4 of 12 test images are of 2 class(es)" in caplog.text
    assert "first: class 4" in caplog.text
    caplog.clear()
    classes_of(features(8), features(2))
    assert not caplog.text
