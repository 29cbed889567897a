"""Whole runs in this process: what the configuration promises of steps, lines, checkpoints and updates, in numbers that
follow from arithmetic."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_config  # configuration keys: every section
from safetensors.torch import load_file
from truth import formulas

from lejepa_scale.config import validate
from lejepa_scale.errors import UserError
from lejepa_scale.parallel import process_group
from lejepa_scale.training.loop import train
from lejepa_scale.training.probe import OnlineProbe

_number = count()


class Finished:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())

    def tensors(self, file: str) -> dict[str, np.ndarray]:
        last = self.folder / "checkpoints" / self.checkpoints[-1]
        return {name: t.double().numpy() for name, t in load_file(last / f"{file}.safetensors").items()}


@pytest.fixture
def run(tmp_path: Path, scenes: Path) -> Iterator[Any]:
    def start(**sections: dict[str, Any]) -> Finished:
        folder = tmp_path / f"run{next(_number)}"
        model = {"encoder": "vit_nano", "options": {"depth": 1, "embed_dim": 32, "num_heads": 2},
                 "projector": {"hidden": 24, "dim": 8, "layers": 2}}  # fmt: skip
        train(validate(small_config(folder, scenes, **{"model": model, **sections})))
        return Finished(folder)

    yield start
    process_group.leave()  # a run that was stopped by an error has not


def test_lines_rates_and_checkpoints_come_when_they_are_asked_for(run: Any) -> None:
    found = run(
        train={"steps": 7, "global_batch": 8},
        objective={"lambda": 0.2},
        optim={"lr": 0.01, "final_lr_ratio": 0.25, "warmup_steps": 2},
        log={"every": 3},
        checkpoint={"every": 2, "keep": 3},
        probe={"enabled": False},
        engine={"name": "single", "precision": "fp32", "timeout_minutes": 9},
    )
    assert [line["step"] for line in found.lines] == [3, 6, 7]
    assert [line["samples"] for line in found.lines] == [24, 48, 56]
    half = 0.5 * (1 + np.cos(np.pi * np.array([0, 3, 4]) / 4))  # steps 3, 6 and 7; warm-up takes the first two
    assert [line["lr"] for line in found.lines] == pytest.approx(0.0025 + 0.0075 * half)
    assert found.checkpoints == ["step_00000004", "step_00000006", "step_00000007"]
    for line in found.lines:
        assert line["loss"] == pytest.approx(0.8 * line["loss_prediction"] + 0.2 * line["loss_sigreg"], rel=1e-5)
        assert line["loss_normalized"] == pytest.approx(line["loss"] / 0.2**0.4, rel=1e-12)
        assert 1 <= line["effective_rank"] <= 8
        assert "probe_accuracy" not in line
    assert process_group.timeout() == timedelta(minutes=9)


def test_weight_decay_is_the_configurations(run: Any) -> None:
    """AdamW's first step moves a weight by lr at most, beside the decay of lr wd = 0.4."""
    once = {"steps": 1, "global_batch": 8}
    plain, decayed = (run(train=once, optim={"lr": 1e-4, "weight_decay": wd}).tensors("model") for wd in (0.0, 4e3))
    for name, before in plain.items():
        if before.ndim > 1 and "embed" not in name.rpartition(".")[2] and "token" not in name:
            assert np.abs(decayed[name] - 0.6 * before).max() < 1e-4, name


def test_the_probe_learns_at_its_own_rate(run: Any) -> None:
    """AdamW's first step is lr for every weight that has a gradient."""
    once = {"steps": 1, "global_batch": 8}
    still, moved = (run(train=once, probe={"lr": lr}).tensors("probe") for lr in (1e-12, 0.125))
    step = np.abs(moved["head.1.weight"] - still["head.1.weight"])
    assert step.max() == pytest.approx(0.125, rel=1e-3)
    assert np.median(step) == pytest.approx(0.125, rel=1e-3)


def test_the_gradient_of_micro_batches_is_that_of_the_batch(run: Any) -> None:
    """With exact accumulation the reported norm is that of one batch, whatever it is divided into."""
    norms = [
        run(train={"steps": 1, "global_batch": 8, "micro_batch": micro}, objective={"accumulation": "exact"}).lines[0]
        for micro in (8, 4, 2)
    ]
    assert [line["grad_norm"] for line in norms] == pytest.approx([norms[0]["grad_norm"]] * 3, rel=1e-4)


def test_a_run_stops_after_as_many_bad_steps_as_it_may_take(run: Any) -> None:
    """A learning rate of 1e30 leaves no finite weight after the first step."""
    with pytest.raises(UserError, match=r"2 non-finite steps in a row up to step 3 \(train.max_nonfinite = 2\)"):
        run(train={"steps": 9, "global_batch": 8, "max_nonfinite": 2}, optim={"lr": 1e30})


def test_one_update_of_the_probe_by_hand() -> None:
    """Standardized rows, softmax regression's gradient, AdamW with a decay of 1e-4; the score is from before."""
    rng = np.random.default_rng(0)
    features, labels = 5 * rng.normal(size=(30, 6)) + 2, np.arange(30) % 3
    probe = OnlineProbe(6, 3, 0.05, 0, torch.device("cpu"))
    before = {name: t.double().numpy() for name, t in probe.state_dict().items()}
    weight, bias = before["head.1.weight"], before["head.1.bias"]
    x = (features - features.mean(1, keepdims=True)) / np.sqrt(features.var(1, keepdims=True) + 1e-5)
    logits = x @ weight.T + bias
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    error = (p - np.eye(3)[labels]) / 30
    hits = probe.step(torch.from_numpy(features).float(), torch.from_numpy(labels), torch.tensor(True))
    assert hits.tolist() == [(logits.argmax(1) == labels).sum(), 30]
    options = {"lr": 0.05, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4}
    after = probe.state_dict()
    for name, old, gradient in (("weight", weight, error.T @ x), ("bias", bias, error.sum(0))):
        expected = formulas.adamw(old, [gradient], **options)
        np.testing.assert_allclose(after[f"head.1.{name}"].numpy(), expected, rtol=1e-6, atol=1e-7)
