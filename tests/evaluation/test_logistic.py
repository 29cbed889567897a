"""Logistic regression against scikit-learn at the same C, and the choice of C."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

import pytest
import torch
from blobs import blobs, uneven
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.features import Features
from lejepa_scale.evaluation.logistic import STRENGTHS, fitted, hold_out, logistic
from lejepa_scale.evaluation.metrics import join

module = import_module("lejepa_scale.evaluation.logistic")  # the package may export the function of this name
TRAIN, TEST = uneven(blobs(400, 1), 2), uneven(blobs(1000, 2), 2)


def fit(strength: float, standardize: bool, **options: Any) -> Any:
    options = {"held_out": 0.1, "seed": 0, "max_iterations": 1000, "device": None} | options
    return fitted(TRAIN, TRAIN.labels.unique(), [strength], standardize=standardize, **options)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("strength", [1e-5, 1e-2, 0.3, 100.0])
def test_probabilities_equal_scikit_learns(strength: float, standardize: bool) -> None:
    rows, test = TRAIN.rows.double().numpy(), TEST.rows.double().numpy()
    if standardize:
        scaler = StandardScaler().fit(rows)
        rows, test = scaler.transform(rows), scaler.transform(test)
    theirs = LogisticRegression(C=strength, tol=1e-9, max_iter=10_000).fit(rows, TRAIN.labels.numpy())
    expected = torch.from_numpy(theirs.predict_proba(test))
    model, settings = fit(strength, standardize)
    assert settings["converged"]
    found = model(TEST.rows).softmax(1)
    assert float((found - expected).abs().max()) < 1e-3
    guesses = logistic(TRAIN, TEST, strengths=[strength], standardize=standardize)
    accuracy = float((guesses.ranked[:, 0] == TEST.labels).double().mean())
    assert accuracy == pytest.approx(theirs.score(test, TEST.labels.numpy()), abs=0.003)
    assert accuracy < 0.9  # or agreeing would be easy


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = fit(1.0, True)
    monkeypatch.setattr(module, "_ROWS", 37)
    found, _ = fit(1.0, True)
    torch.testing.assert_close(found.weight, expected.weight, atol=1e-5, rtol=0)


def test_features_too_large_to_keep_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: scaled anew in each pass, or once."""
    train, test = uneven(blobs(300, seed=0), 2), uneven(blobs(50, seed=1), 2)
    kept = logistic(train, test, strengths=[1e-2, 1.0])
    monkeypatch.setattr(module, "_KEPT", 0)
    again = logistic(train, test, strengths=[1e-2, 1.0])
    assert torch.equal(kept.ranked, again.ranked)
    assert kept.settings == again.settings


def test_the_published_grid() -> None:
    assert len(STRENGTHS) == 45
    assert STRENGTHS[0] == pytest.approx(1e-6)
    assert STRENGTHS[-1] == pytest.approx(1e5)
    assert STRENGTHS[1] / STRENGTHS[0] == pytest.approx(10**0.25)


def test_the_strength_is_chosen_as_by_hand() -> None:
    train, strengths = uneven(blobs(200, 5, spread=2.5), 2), [100.0, 1e-4, 0.01, 1e-3, 0.1]
    kept, held = hold_out(train.labels, 0.3, 7)
    by_hand = {}
    for c in sorted(strengths):
        theirs = LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(
            train.rows[kept].numpy(), train.labels[kept].numpy()
        )
        by_hand[c] = theirs.score(train.rows[held].numpy(), train.labels[held].numpy())
    guesses = logistic(train, TEST, strengths=strengths, held_out=0.3, seed=7)
    assert guesses.settings["accuracies"] == pytest.approx(by_hand)
    chosen = max(by_hand, key=lambda c: by_hand[c])
    assert guesses.settings["strength"] == chosen
    assert guesses.settings["held_out_accuracy"] == pytest.approx(by_hand[chosen])
    assert guesses.settings["held_out_rows"] == len(held)
    # refitted on all rows
    theirs = LogisticRegression(C=chosen, tol=1e-8, max_iter=5000).fit(train.rows.numpy(), train.labels.numpy())
    agree = torch.from_numpy(theirs.predict(TEST.rows.numpy())) == guesses.ranked[:, 0]
    assert agree.double().mean() > 0.998
    partly = LogisticRegression(C=chosen, tol=1e-8, max_iter=5000).fit(
        train.rows[kept].numpy(), train.labels[kept].numpy()
    )
    assert (partly.predict(TEST.rows.numpy()) != guesses.ranked[:, 0].numpy()).mean() > 0.01


@pytest.mark.unchecked
def test_the_search_ends_where_accuracy_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = {0.1: 0.2, 1.0: 0.8, 10.0: 0.4, 100.0: 0.4, 1e3: 0.4, 1e4: 0.9}
    tried = search(monkeypatch, accuracies)
    assert list(tried) == [0.1, 1.0, 10.0, 100.0, 1e3]
    once = {0.1: 0.2, 1.0: 0.8, 10.0: 0.4, 100.0: 0.4, 1e3: 0.8, 1e4: 0.9}  # recovers
    assert list(search(monkeypatch, once)) == list(once)


@pytest.mark.unchecked
def test_a_long_grid_is_searched_around_its_best(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = {float(c): 0.9 if c in (18, 19) else 0.8 if c == 17 else 0.5 for c in range(1, 30)}
    assert list(search(monkeypatch, peak)) == [1, 5, 9, 13, 14, 15, 16, 17, 18, 19, 20, 21, 25, 29]
    level = {float(c): 0.7 for c in range(1, 30)}
    assert list(search(monkeypatch, level)) == [1, 2, 3, 4, 5, 9, 13, 17, 21, 25, 29]
    chance = {float(c): 0.1 if c < 25 else 0.9 for c in range(1, 30)}  # as one class gets: the search goes on
    assert list(search(monkeypatch, chance)) == [1, 5, 9, 13, 17, 21, 22, 23, 24, 25, 26, 27, 28, 29]


def search(monkeypatch: pytest.MonkeyPatch, accuracies: dict[float, float]) -> dict[float, float]:
    """The search with classifiers of these accuracies, 100 rows of 10 classes held out."""
    labels = torch.arange(1000) % 10
    one_hot = torch.nn.functional.one_hot(labels, 10).double()

    def pretend(problem: Any, index: Any, start: Any, strength: float, tolerance: float) -> Any:
        assert tolerance == 1e-4

        def model(rows: torch.Tensor) -> torch.Tensor:
            scores = rows.clone()
            wrong = torch.arange(len(rows)) >= round(accuracies[strength] * len(rows))
            scores[wrong] = scores[wrong].roll(1, 1)
            return scores

        return model, 0.0

    class Problem:
        pass

    problem: Any = Problem()
    problem.rows, problem.labels = one_hot, labels
    monkeypatch.setattr(module, "_fit", pretend)
    chosen, found = module._chosen(problem, None, sorted(accuracies), None, torch.arange(100))
    assert found == pytest.approx({c: accuracies[c] for c in found})
    assert chosen == max(found, key=lambda c: found[c])
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
def test_shares_change_nothing(world: int) -> None:
    options: Any = {"strengths": [0.01, 1.0], "max_iterations": 50}
    parts = [logistic(TRAIN, TEST, share=(rank, world), **options) for rank in range(world)]
    whole = logistic(TRAIN, TEST, **options)
    assert join(parts).ranked.equal(whole.ranked)
    assert len(parts[0].ranked) == 1000 // world


def test_a_tenth_of_every_class_is_held_out() -> None:
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate((1, 2, 10, 100, 47))])[torch.randperm(160)]
    kept, held = hold_out(labels, 0.1, 3)
    assert labels[held].bincount(minlength=5).tolist() == [0, 1, 1, 10, 5]
    assert torch.cat([kept, held]).sort().values.tolist() == list(range(160))
    assert held.tolist() == hold_out(labels, 0.1, 3)[1].tolist() == sorted(held.tolist())
    assert held.tolist() != hold_out(labels, 0.1, 4)[1].tolist()
    assert hold_out(labels, 0.99, 3)[0].tolist() != []
    assert labels[hold_out(labels, 0.999, 3)[0]].bincount(minlength=5).min() == 1
    with pytest.raises(UserError, match="each of the 4 classes has 1 training image"):
        hold_out(torch.arange(4), 0.1, 0)
    for share in (0.0, 1.0):
        with pytest.raises(UserError, match=f"held_out={share}"):
            hold_out(labels, share, 0)


def test_what_looks_wrong_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        guesses = logistic(TRAIN, TEST, strengths=[1e-5, 1e-2], max_iterations=500)
        assert "the best C, 0.01, is at the end of the grid 1e-05..0.01" in caplog.text
        assert guesses.settings["converged"]
        assert "converged" not in caplog.text
        caplog.clear()
        guesses = logistic(TRAIN, TEST, strengths=[10.0], max_iterations=3)
        assert "has not converged at C = 10 after 3 iterations" in caplog.text
        assert not guesses.settings["converged"]
        assert "end of the grid" not in caplog.text


@pytest.mark.parametrize("options", [{"strengths": []}, {"strengths": [0.0]}, {"max_iterations": 0}])
def test_what_cannot_be_fitted_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="strengths C above 0"):
        logistic(TRAIN, TEST, **options)
    with pytest.raises(UserError, match="widths"):
        logistic(TRAIN, Features(TEST.rows[:, 1:], TEST.labels))


def test_a_constant_feature_is_no_trouble() -> None:
    rows = TRAIN.rows.clone()
    rows[:, 3] = 5.0
    for standardize in (False, True):
        guesses = logistic(Features(rows, TRAIN.labels), TEST, strengths=[1.0], standardize=standardize)
        assert guesses.settings["standardized"] is standardize
        assert (guesses.ranked[:, 0] == TEST.labels).double().mean() > 0.3
