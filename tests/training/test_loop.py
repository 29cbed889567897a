"""What the loop owes to a step, without processes: see tests/cli/test_train.py for whole runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import small_config

from lejepa_scale.checkpoint import Progress
from lejepa_scale.config import BatchPlan, dump, validate
from lejepa_scale.cost import step_flops
from lejepa_scale.errors import UserError
from lejepa_scale.training import actions, loop, resume


def test_mfu_is_what_the_step_needs_at_the_peak_over_what_it_took(
    monkeypatch: pytest.MonkeyPatch, scenes: Path, tmp_path: Path
) -> None:
    """With stochastic depth and two micro-batches, on a chip of 1 TFLOP/s."""
    monkeypatch.setattr(actions, "peak_flops", lambda device: 1e12)
    sections = {"train": {"steps": 2, "global_batch": 16, "micro_batch": 8}}
    config = validate(small_config(tmp_path, scenes, **sections, model={"drop_path": 0.5, "options": {"depth": 3}}))
    loop.train(config)
    needed = step_flops(config, BatchPlan(micro_batch=8, ranks=1, accumulation=2)).total / 1e12
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["mfu"] == pytest.approx(needed * record["images_per_second"] / 16, rel=1e-9)


def test_a_run_is_not_resumed_with_another_global_batch(tmp_path: Path) -> None:
    """It would begin at another sample than the one it stopped at. A run without steps may still change."""
    before, after = (
        validate(small_config(tmp_path, "u", train={"steps": 4, "global_batch": batch})) for batch in (16, 32)
    )
    (tmp_path / "config.yaml").write_text(dump(before))
    resume._refuse_another_batch(before, Progress(2, "shards"))
    resume._refuse_another_batch(after, Progress(0, "shards"))
    with pytest.raises(UserError, match=r"step 2 with train.global_batch = 16, not 32"):
        resume._refuse_another_batch(after, Progress(2, "shards"))
