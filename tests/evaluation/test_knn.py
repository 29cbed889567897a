"""k-NN against scikit-learn; blocks, chunks and shares change nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from blobs import blobs
from sklearn.neighbors import KNeighborsClassifier

from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.features import Features
from lejepa_scale.evaluation.knn import knn, merge

TRAIN, TEST = blobs(301, 1, classes=8), blobs(97, 2, classes=8)
KS = (1, 5, 20, 301)


def same(found: dict, expected: dict) -> None:  # type: ignore[type-arg]
    assert list(found) == list(expected)
    for k, guesses in found.items():
        assert guesses.settings == expected[k].settings
        assert guesses.ranked.equal(expected[k].ranked), k


@pytest.mark.parametrize("temperature", [0.07, 0.5, 0.002])
def test_votes_equal_scikit_learns(temperature: float) -> None:
    found = knn(TRAIN, TEST, KS, temperature, chunk=40, block=64)
    assert list(found) == list(KS)
    rows, bank = (F.normalize(f.rows.double(), dim=1).numpy() for f in (TEST, TRAIN))
    for k, guesses in found.items():
        theirs = KNeighborsClassifier(
            k, algorithm="brute", metric="cosine", weights=lambda distance: np.exp(-distance / temperature)
        ).fit(bank, TRAIN.labels.numpy())
        probabilities = torch.from_numpy(theirs.predict_proba(rows))
        classes = torch.from_numpy(theirs.classes_)
        assert (guesses.ranked[:, 0] == classes[probabilities.argmax(1)]).all()
        order = classes[probabilities.sort(dim=1, descending=True, stable=True).indices[:, :5]]
        assert (guesses.ranked == order).float().mean() > 0.99  # far behind, votes differ by less than rounding
        assert guesses.settings == {"k": k, "temperature": temperature, "weights": "exp(cosine / temperature)"}
        assert 0.3 < float((guesses.ranked[:, 0] == TEST.labels).float().mean()) < 0.9


@pytest.mark.parametrize(("chunk", "block"), [(1, 1), (13, 50), (97, 301), (1024, 8192)])
def test_blocks_change_nothing(chunk: int, block: int) -> None:
    same(knn(TRAIN, TEST, KS, chunk=chunk, block=block), knn(TRAIN, TEST, KS))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 100])
def test_shares_change_nothing(world: int) -> None:
    parts = [knn(TRAIN, TEST, KS, share=(rank, world), chunk=20) for rank in range(world)]
    assert max(len(part[1].ranked) for part in parts) - min(len(part[1].ranked) for part in parts) <= 1
    same(merge(parts), knn(TRAIN, TEST, KS))


def test_a_low_temperature_leaves_the_vote_to_the_nearest() -> None:
    found = knn(TRAIN, TEST, (1, 301), 1e-5)  # exp(1 / 1e-5) is no number
    assert found[301].ranked[:, 0].equal(found[1].ranked[:, 0])


@pytest.mark.parametrize("width", [3, 64, 257, 1000])
def test_equal_rows_go_to_the_smaller_one(width: int) -> None:
    """All features of a collapsed encoder are one: the nearest are the first."""
    row = torch.randn(1, width)
    train = Features(row.repeat(64, 1), torch.tensor([2, 1, 1] + [0] * 61))
    test = Features(row.repeat(9, 1), torch.zeros(9, dtype=torch.long))
    for block in (1, 3, 7, 64):
        for chunk in (1, 2, 9):
            found = knn(train, test, (1, 2, 3, 64), block=block, chunk=chunk)
            assert [found[k].ranked[:, 0].unique().tolist() for k in found] == [[2], [1], [1], [0]]


def test_rows_of_one_direction_are_equally_near() -> None:
    """Whatever their lengths leave in the last bits."""
    row = torch.randn(1, 100)
    train = Features(row * torch.linspace(0.1, 9, 40)[:, None], torch.arange(40))
    test = Features(row * torch.linspace(0.3, 5, 30)[:, None], torch.zeros(30, dtype=torch.long))
    assert knn(train, test, (1,), block=11)[1].ranked[:, 0].tolist() == [0] * 30


def test_k_is_measured_against_the_set() -> None:
    with pytest.raises(UserError, match="k=302 is larger than the training set, which has 301 images"):
        knn(TRAIN, TEST, (1, 302))
    assert list(knn(TRAIN, TEST)) == [10, 20, 100, 200]
    assert list(knn(blobs(100, 3), TEST)) == [10, 20, 100]
    assert list(knn(blobs(7, 3), TEST)) == [7]
    for ks in ((), (0, 3)):
        with pytest.raises(UserError, match="at least one k"):
            knn(TRAIN, TEST, ks)
    with pytest.raises(UserError, match="got temperature=0"):
        knn(TRAIN, TEST, temperature=0.0)
    with pytest.raises(UserError, match="block=0"):
        knn(TRAIN, TEST, block=0)
    with pytest.raises(UserError, match="got"):
        merge([knn(TRAIN, TEST, (1,)), knn(TRAIN, TEST, (2,))])
    with pytest.raises(UserError, match="widths"):
        knn(TRAIN, blobs(5, 1, width=3))


def test_float32_finds_the_same_neighbours_of_rows_that_differ() -> None:
    same(knn(TRAIN, TEST, (1, 20), dtype=torch.float32), knn(TRAIN, TEST, (1, 20)))


def test_lengths_of_rows_do_not_matter() -> None:
    scaled = Features(TRAIN.rows * torch.logspace(-2, 2, 301)[:, None], TRAIN.labels)
    same(knn(scaled, TEST, (5,)), knn(TRAIN, TEST, (5,)))
