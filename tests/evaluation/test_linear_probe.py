"""The linear probe against torch's own modules and optimizer, head by head."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

import pytest
import torch
from blobs import blobs, uneven
from torch import nn

from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.features import Features
from lejepa_scale.evaluation.linear_probe import RATES, linear_probe
from lejepa_scale.evaluation.logistic import hold_out

module = import_module("lejepa_scale.evaluation.linear_probe")  # the package may export the function of this name


TRAIN, TEST = uneven(blobs(400, 1), 0.5), uneven(blobs(500, 2), 0.5)
SHORT: dict[str, Any] = {"steps": 60, "batch": 96}


def plain(index: torch.Tensor, rate: float, norm: str, weight_decay: float = 0.0) -> nn.Module:
    """One head by torch alone, from the same first weights and batches."""
    rows, labels = TRAIN.rows, torch.searchsorted(TRAIN.labels.unique(), TRAIN.labels)
    layer = nn.Linear(12, 6)
    recipe = module._Recipe(6, 96, 60, weight_decay, norm, 0)
    with torch.no_grad():
        layer.weight.copy_(module._first(rows, 96, 1, recipe).weight[0].T)
        layer.bias.zero_()
    norms = {
        "none": nn.Identity,
        "batch": lambda: nn.BatchNorm1d(12, affine=False, eps=1e-6),
        "layer": lambda: nn.LayerNorm(12),
    }
    head = nn.Sequential(norms[norm](), layer)
    optimizer = torch.optim.SGD(head.parameters(), rate * 96 / 256, momentum=0.9, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    for some in module.batches(index, 96, 60, 0):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(rows[some]), labels[some]).backward()
        optimizer.step()
        schedule.step()
    return head.eval()


@pytest.mark.parametrize(
    ("norm", "decay"), [("none", 0.0), ("batch", 0.0), ("layer", 0.0), ("layer", 0.05), ("none", 0.05)]
)
def test_every_head_equals_its_own_loop(norm: Any, decay: float) -> None:
    rates, kept = [1e-3, 0.05, 0.5], hold_out(TRAIN.labels, 0.1, 0)[0]
    labels = torch.searchsorted(TRAIN.labels.unique(), TRAIN.labels)
    heads = module._trained(TRAIN.rows, labels, kept, rates, module._Recipe(6, 96, 60, decay, norm, 0))
    for logits, rate in zip(heads(TEST.rows), rates, strict=True):
        torch.testing.assert_close(logits, plain(kept, rate, norm, decay)(TEST.rows).detach(), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_the_rate_is_chosen_on_held_out_rows_and_all_are_used_then(norm: Any) -> None:
    rates = [0.5, 1e-4, 0.05]
    kept, held = hold_out(TRAIN.labels, 0.1, 0)
    targets = torch.searchsorted(TRAIN.labels.unique(), TRAIN.labels)
    by_hand = {
        rate: float((plain(kept, rate, norm)(TRAIN.rows[held]).argmax(1) == targets[held]).double().mean())
        for rate in sorted(rates)
    }
    chosen = max(by_hand, key=lambda rate: by_hand[rate])
    for refit in (True, False):
        guesses = linear_probe(TRAIN, TEST, learning_rates=rates, norm=norm, refit=refit, **SHORT)
        assert guesses.settings["accuracies"] == pytest.approx(by_hand)
        assert guesses.settings["learning_rate"] == chosen
        assert guesses.settings["scaled_rate"] == pytest.approx(chosen * 96 / 256)
        assert guesses.settings["held_out_accuracy"] == pytest.approx(by_hand[chosen])
        assert (guesses.settings["norm"], guesses.settings["refit"]) == (norm, refit)
        logits = plain(torch.arange(400) if refit else kept, chosen, norm)(TEST.rows)
        assert (TRAIN.labels.unique()[logits.argmax(1)] == guesses.ranked[:, 0]).double().mean() > 0.995
        assert 0.4 < (guesses.ranked[:, 0] == TEST.labels).double().mean() < 0.95


def test_the_published_rates() -> None:
    assert RATES == (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)


def test_test_labels_choose_nothing() -> None:
    shuffled = Features(TEST.rows, TEST.labels.roll(1))
    one, other = (linear_probe(TRAIN, test, learning_rates=RATES[-4:], **SHORT) for test in (TEST, shuffled))
    assert one.ranked.equal(other.ranked)


def test_a_seed_decides() -> None:
    one, same, other = (linear_probe(TRAIN, TEST, learning_rates=[0.05], seed=seed, **SHORT) for seed in (0, 0, 1))
    assert one.ranked.equal(same.ranked)
    assert one.settings == same.settings
    assert not one.ranked.equal(other.ranked)


def test_the_grid_around_the_chosen_rate_does_not_matter() -> None:
    wide = linear_probe(TRAIN, TEST, learning_rates=[1e-5, 0.1, 1e-4], refit=False, **SHORT)
    assert wide.settings["learning_rate"] == 0.1
    alone = linear_probe(TRAIN, TEST, learning_rates=[0.1], refit=False, **SHORT)
    assert (wide.ranked == alone.ranked).double().mean() > 0.999


def test_batches_are_whole_epochs_in_random_order() -> None:
    index = torch.arange(0, 40, 2)
    batches = list(module.batches(index, 6, 7, 3))
    assert [len(b) for b in batches] == [6] * 7
    for epoch in (batches[:3], batches[3:6]):
        rows = torch.cat(epoch)
        assert len(rows.unique()) == 18  # the last 2 of 20 are another 2 each time
        assert torch.isin(rows, index).all()
    assert not torch.cat(batches[:3]).equal(torch.cat(batches[3:6]))
    assert linear_probe(TRAIN, TEST, steps=3, batch=5000, refit=False).settings["batch"] < 400


def test_rates_that_are_too_large_are_left_out_aloud(caplog: pytest.LogCaptureFixture) -> None:
    large = Features(TRAIN.rows * 1e3, TRAIN.labels)
    with caplog.at_level(logging.WARNING):
        guesses = linear_probe(large, TEST, learning_rates=[1e-6, 1e-5, 1e38], **SHORT)
    assert "1 of 3 heads of the linear probe diverged, from learning rate 1e+38 on" in caplog.text
    assert guesses.settings["diverged"] == [1e38]
    assert set(guesses.settings["accuracies"]) == {1e-6, 1e-5}
    with pytest.raises(UserError, match=r"all 1 heads .* diverged, from learning rate 1e\+38"):
        linear_probe(large, TEST, learning_rates=[1e38], **SHORT)


def test_the_end_of_the_grid_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        linear_probe(TRAIN, TEST, learning_rates=[1e-5, 0.02], **SHORT)
        assert "the best learning rate, 0.02, is at the end of the grid" in caplog.text
        caplog.clear()
        linear_probe(TRAIN, TEST, learning_rates=[0.02], **SHORT)
        assert not caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rates": []}, "learning rates above 0"),
        ({"learning_rates": [0.1, -1.0]}, "learning rates above 0"),
        ({"batch": 0}, "batch=0"),
        ({"steps": 0}, "steps=0"),
        ({"weight_decay": -1.0}, r"weight_decay=-1\.0"),
        ({"held_out": 1.0}, r"held_out=1\.0"),
    ],
)
def test_what_cannot_be_trained_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        linear_probe(TRAIN, TEST, **options)


@pytest.mark.unchecked
def test_another_norm_is_refused() -> None:
    with pytest.raises(UserError, match='"batch" or "layer"; got \'group\''):
        linear_probe(TRAIN, TEST, norm="group")  # type: ignore[arg-type]
