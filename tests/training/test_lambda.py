"""A run whose lambda moves: what it reports, what it goes on with, and what is made of it without labels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from conftest import small_config

from lejepa_scale.checkpoint.metrics import read_metrics
from lejepa_scale.config import validate
from lejepa_scale.operations import selection
from lejepa_scale.training.loop import train

MOVING = {"lambda": 0.2, "final_lambda": 0.01}


def lambda_of(step: int, total: int) -> float:
    """After `step` steps, by hand."""
    return 0.01 + 0.19 * (1 + math.cos(math.pi * (step - 1) / (total - 1))) / 2


def records(run: Path, kind: str = "loss") -> dict[int, dict[str, Any]]:
    return {int(record["step"]): record for record in read_metrics(run / "metrics.jsonl") if kind in record}


@pytest.mark.parametrize("accumulation", ["micro", "exact"])
def test_lambda_moves_and_the_run_goes_on_bit_for_bit(scenes: Path, tmp_path: Path, accumulation: str) -> None:
    sections: dict[str, dict[str, Any]] = {
        "train": {"steps": 6, "micro_batch": 8},
        "objective": {**MOVING, "accumulation": accumulation},
        "checkpoint": {"every": 2, "keep": 9},
        "evaluation": {"every": 3, "test": str(scenes), "view_images": 32, "time_share": 1.0},
    }
    whole = tmp_path / "whole"
    train(validate(small_config(whole, scenes, **sections)))
    found = records(whole)
    assert list(found) == [1, 2, 3, 4, 5, 6]
    for step, record in found.items():
        now = record["lambda"]
        assert now == pytest.approx(lambda_of(step, 6), rel=1e-12)
        terms = record["loss_prediction"], record["loss_sigreg"]
        assert record["loss"] == pytest.approx((1 - now) * terms[0] + now * terms[1], rel=1e-5)
        assert record["loss_normalized"] == pytest.approx(record["loss"] / now**0.4, rel=1e-12)
    for step, record in records(whole, "eval_loss").items():
        now = lambda_of(step, 6)
        terms = record["eval_loss_prediction"], record["eval_loss_sigreg"]
        assert record["eval_loss"] == pytest.approx((1 - now) * terms[0] + now * terms[1], rel=1e-5)
        assert record["eval_loss_normalized"] == pytest.approx(record["eval_loss"] / now**0.4, rel=1e-9)
    assert list(records(whole, "eval_loss")) == [3, 6]
    tree = small_config(tmp_path / "resumed", scenes, **sections)
    tree["run"]["resume"] = str(whole / "checkpoints/step_00000002")
    train(validate(tree))
    again = records(tmp_path / "resumed")
    names = ("loss", "loss_prediction", "loss_sigreg", "grad_norm", "lambda", "lr")
    assert {step: [record[name] for name in names] for step, record in again.items()} == {
        step: [found[step][name] for name in names] for step in (3, 4, 5, 6)
    }
    read = selection.read_run(whole, window=1.0)
    assert read.lam == 0.01
    assert read.losses == pytest.approx([0.99 * r["loss_prediction"] + 0.01 * r["loss_sigreg"] for r in found.values()])


def test_one_that_does_not_move_is_as_ever(scenes: Path, tmp_path: Path) -> None:
    for name, objective in (("a", {"lambda": 0.1}), ("b", {"lambda": 0.1, "final_lambda": 0.1})):
        train(validate(small_config(tmp_path / name, scenes, train={"steps": 2}, objective=objective)))
    a, b = records(tmp_path / "a"), records(tmp_path / "b")
    assert [record["loss"] for record in a.values()] == [record["loss"] for record in b.values()]
    assert {record["lambda"] for record in a.values()} == {0.1}
