"""What the loop owes to a step, without processes: see tests/cli/test_train.py for whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import small_config

from lejepa_scale.config import BatchPlan, Config, dump, validate
from lejepa_scale.cost import step_flops
from lejepa_scale.errors import UserError
from lejepa_scale.training import actions, loop, resume


def test_mfu_is_what_the_step_needs_at_the_peak_over_what_it_took(
    monkeypatch: pytest.MonkeyPatch, scenes: Path, tmp_path: Path
) -> None:
    """With stochastic depth, without some patches and in two micro-batches, on a chip of 1 TFLOP/s."""
    monkeypatch.setattr(actions, "peak_flops", lambda device: 1e12)
    sections = {"train": {"steps": 2, "global_batch": 16, "micro_batch": 8}}
    model = {"drop_path": 0.5, "patch_drop": {"global": 0.5}, "options": {"depth": 3}}
    config = validate(small_config(tmp_path, scenes, **sections, model=model))
    loop.train(config)
    needed = step_flops(config, BatchPlan(micro_batch=8, ranks=1, accumulation=2)).total / 1e12
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["mfu"] == pytest.approx(needed * record["images_per_second"] / 16, rel=1e-9)


def _saved(run_dir: Path, shards: Path, **sections: Any) -> Config:
    """A run with a checkpoint after every step."""
    return validate(small_config(run_dir, shards, **{"checkpoint": {"every": 1}, **sections}))


@pytest.mark.parametrize(
    ("key", "sections"),
    [
        ("run.seed = 0, not run.seed = 7", {"run": {"seed": 7}}),
        ("data.shuffle_block = 16384, not data.shuffle_block = 8", {"data": {"shuffle_block": 8}}),
        ("train.global_batch = 16, not train.global_batch = 8", {"train": {"steps": 4, "global_batch": 8}}),
        ("weights differ", None),
        ("do not belong to this model", {"model": {"projector": {"dim": 8}}}),
    ],
)
def test_another_order_or_model_is_refused_and_changes_nothing(
    key: str, sections: dict[str, Any] | None, scenes: Path, tmp_path: Path
) -> None:
    """What a run was trained with is read from its checkpoint: config.yaml, which anybody may edit or delete, decides
    nothing, and a refused start does not touch it. The advice works: the keys kept, the run goes on."""
    loop.train(_saved(tmp_path, scenes, train={"steps": 2, "global_batch": 16}))
    (tmp_path / "config.yaml").write_text("edited: by hand")
    if sections is None:
        sections = {"data": {"shards": [{"shards": str(scenes), "weight": weight} for weight in (1, 2)]}}
    another = _saved(tmp_path, scenes, **{"train": {"steps": 4, "global_batch": 16}, **sections})
    with pytest.raises(UserError, match=key):
        loop.train(another)
    assert (tmp_path / "config.yaml").read_text() == "edited: by hand"
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(UserError, match=key):
        loop.train(another)
    loop.train(_saved(tmp_path, scenes, train={"steps": 3, "global_batch": 16, "micro_batch": 8}))
    assert (tmp_path / "checkpoints" / "step_00000003" / "COMPLETE").exists()


@pytest.mark.parametrize("text", ["a: [", "edited by hand", "- 1\n- 2", "", "run: 5", "train: {steps: 1"])
def test_a_config_that_cannot_be_read_is_said_and_written_anew(
    text: str, scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    config = _saved(tmp_path, scenes)
    resume.write_config(config)
    (tmp_path / "config.yaml").write_text(text)
    resume.write_config(config)
    assert (
        "; it is written anew, and a run goes by its checkpoints'" in caplog.text
        or "configuration changed" in caplog.text
    )
    assert (tmp_path / "config.yaml").read_text() == dump(config)
    caplog.clear()
    resume.write_config(config)
    resume.write_config(_saved(tmp_path, scenes, run={"seed": 3}))
    assert "configuration changed since this run was started: run.seed: 0 -> 3" in caplog.text


def test_the_best_checkpoint_is_kept_by_what_the_run_has_measured(
    scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    checkpoint = {"every": 1, "keep": 1, "best": "max:loss"}  # the highest comes early
    loop.train(_saved(tmp_path, scenes, train={"steps": 6, "global_batch": 16}, checkpoint=checkpoint))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    best = max(records, key=lambda record: record["loss"])
    kept = {f"step_{step:08d}" for step in (best["step"], 6)}
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == kept
    assert (tmp_path / "best_checkpoint").read_text() == f"step_{best['step']:08d} loss {best['loss']}\n"
    assert f"is the best so far: loss = {best['loss']:g}." in caplog.text


def test_a_metric_that_the_run_does_not_have_is_refused_at_the_first_line(scenes: Path, tmp_path: Path) -> None:
    checkpoint = {"every": 100, "best": "max:accuracy"}
    with pytest.raises(
        UserError, match=r"checkpoint\.best=max:accuracy: .* it has data_wait_fraction, .*, probe_accuracy"
    ):
        loop.train(_saved(tmp_path, scenes, train={"steps": 6, "global_batch": 16}, checkpoint=checkpoint))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
