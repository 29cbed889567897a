"""A run whose length is in epochs: its steps, what it records, how it goes on, on one rank and on two."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import small_config
from ranks import run_ranks

from lejepa_scale.checkpoint import Saved, find
from lejepa_scale.checkpoint.metrics import read_metrics
from lejepa_scale.config import validate
from lejepa_scale.data.make import sources
from lejepa_scale.data.make.writer import write_shards
from lejepa_scale.errors import UserError
from lejepa_scale.parallel import process_group
from lejepa_scale.training.loop import train


def epochs(run: Path, shards: Any, count: float, **sections: dict[str, Any]) -> dict[str, Any]:
    """96 scenes in batches of 16: an epoch is 6 steps."""
    tree = small_config(run, "unused", **sections)
    tree["train"] = {"global_batch": 16, "epochs": count}
    tree["data"]["shards"] = shards if isinstance(shards, list) else str(shards)
    return tree


def lines(run: Path) -> dict[int, tuple[float, ...]]:
    return {
        int(r["step"]): (r["loss"], r["lr"], r["lambda"], r["grad_norm"]) for r in read_metrics(run / "metrics.jsonl")
    }


HALF = {"optim": {"warmup_steps": "0.5 epochs"}, "checkpoint": {"every": "0.25 epochs"}, "log": {"every": "25%"}}


def test_epochs_are_the_steps_that_they_stand_for(
    scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run in words takes the steps of one in steps, bit for bit; it records the words, and the steps beside."""
    caplog.set_level(logging.INFO)
    train(validate(epochs(tmp_path / "words", scenes, 1.1, **HALF)))
    assert "1.1 epochs = 6 steps of 16 (106 images); optim.warmup_steps 0.5 epochs = 3 steps;" in caplog.text
    plain = small_config(
        tmp_path / "steps", scenes, train={"steps": 6}, optim={"warmup_steps": 3}, checkpoint={"every": 1}
    )
    train(validate(plain))
    assert lines(tmp_path / "words") == lines(tmp_path / "steps")
    assert len(lines(tmp_path / "words")) == 6
    saved = Saved(find(tmp_path / "words"))
    for text in ((tmp_path / "words/config.yaml").read_text(), saved.config_text()):
        tree = yaml.safe_load(text)
        assert tree["train"]["epochs"] == 1.1
        assert (tree["train"]["steps"], tree["optim"]["warmup_steps"]) == (None, "0.5 epochs")
    state = json.loads((saved.path / "state.json").read_text())
    assert state["epoch"] == 96
    assert {key: state["durations"][key] for key in ("train.steps", "optim.warmup_steps", "checkpoint.every")} == {
        "train.steps": 6, "optim.warmup_steps": 3, "checkpoint.every": 1,
    }  # fmt: skip
    train(validate(epochs(tmp_path / "words", scenes, 1.1, **HALF)))
    assert "is trained to step 6 already; raise train.epochs to go on" in caplog.text


@pytest.mark.parametrize("schedule", [{"optim": {"schedule": "wsd", "cooldown_steps": "2 steps"}}])
def test_a_longer_run_goes_on_as_if_it_had_been_so_long(
    scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, schedule: dict[str, Any]
) -> None:
    """With a flat learning rate, from a checkpoint before the cooldown; the change is told of in words."""
    kept = {"every": 2, "keep_every": "4 steps", "keep": 1}
    train(validate(epochs(tmp_path / "short", scenes, 1, **schedule, checkpoint=kept)))
    train(validate(epochs(tmp_path / "whole", scenes, 1.5, **schedule, checkpoint=kept)))
    tree = epochs(tmp_path / "longer", scenes, 1.5, **schedule, checkpoint=kept)
    tree["run"]["resume"] = str(tmp_path / "short/checkpoints/step_00000004")
    train(validate(tree))
    whole = lines(tmp_path / "whole")
    assert lines(tmp_path / "longer") == {step: whole[step] for step in range(5, 10)}
    caplog.set_level(logging.INFO)
    train(validate(epochs(tmp_path / "short", scenes, 1.2, **schedule, checkpoint=kept)))
    assert "train.epochs: 1.0 -> 1.2" in caplog.text
    assert max(lines(tmp_path / "short")) == 7


def test_other_data_or_another_batch_is_refused_as_ever(scenes: Path, tmp_path: Path) -> None:
    """An epoch of another size would move every duration: a run does not go on so."""
    more = tmp_path / "more"
    source = sources.scenes(40, 32, 7, "png", 90)
    write_shards(source.samples, more, per_shard=40, total=40, classes=source.classes, description={})
    run = tmp_path / "run"
    train(validate(epochs(run, scenes, 0.2)))
    with pytest.raises(UserError, match=r"not those that .* was trained on"):
        train(validate(epochs(run, [{"shards": str(scenes)}, {"shards": str(more)}], 1)))
    tree = epochs(run, scenes, 1)
    tree["train"]["global_batch"] = 32
    with pytest.raises(UserError, match=r"trained with train\.global_batch = 16, not train\.global_batch = 32"):
        train(validate(tree))
    mixed = tmp_path / "mixed"  # 136 images in all, whatever the weights: 8.5 steps
    train(
        validate(epochs(mixed, [{"shards": str(scenes)}, {"shards": str(more), "weight": 9}], 1, log={"every": "50%"}))
    )
    assert list(lines(mixed)) == [4, 8]
    assert Saved(find(mixed)).progress.epoch == 136


def test_less_than_a_step_is_refused_before_anything_is_written(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.epochs = 0\.1 is less than a step: 0\.6 of a batch"):
        train(validate(epochs(tmp_path / "run", scenes, 0.1)))
    assert not (tmp_path / "run/config.yaml").exists()


def _on_a_rank(run: Path, shards: Path) -> list[str]:
    process_group.joined = lambda timeout: nullcontext(torch.device("cpu"))  # type: ignore[assignment]
    tree = epochs(run, shards, 0.7, engine={"name": "ddp"}, **HALF)
    train(validate(tree))
    tree["train"]["epochs"] = 0.01
    tree["run"]["dir"] = f"{run}_refused"
    with pytest.raises(UserError, match="less than a step") as refused:
        train(validate(tree))
    return [str(refused.value)]


def test_two_ranks_take_the_same_steps(scenes: Path, tmp_path: Path) -> None:
    first, second = run_ranks(_on_a_rank, 2, tmp_path / "two", scenes)
    assert first == second
    train(validate(epochs(tmp_path / "one", scenes, 0.7, **HALF)))
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert list(one) == list(two) == [1, 2, 3, 4]
    for step, numbers in one.items():
        assert two[step] == pytest.approx(numbers, rel=1e-4)
