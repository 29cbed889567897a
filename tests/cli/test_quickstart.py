"""The quickstart's recipe in small: two engines, one story."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Command

TRAIN = ROOT / "launchers/train.py"


def losses(run: Path) -> list[Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[line[k] for k in ("loss", "loss_prediction", "loss_sigreg")] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [6, 20])
def test_quickstart_is_the_same_under_fsdp_and_zero3(command: Command, tmp_path: Path, steps: int) -> None:
    """The recipe's first steps, with smaller batches and by AdamW at a low rate: FSDP, and ZeRO-3 under the deepspeed
    launcher, which has no Muon."""
    shards = tmp_path / "scenes"
    made = command(ROOT / "tools/make_shards.py", "synthetic", "--out", shards, "--count", 200, "--size", 48)
    assert made.returncode == 0, made.stderr
    found = []
    for engine, launcher in (("fsdp", None), ("zero3", "deepspeed")):
        run = tmp_path / engine
        result = command(
            TRAIN, "--config", ROOT / "configs/quickstart.yaml", f"run.dir={run}", f"data.shards={shards}",
            f"train.steps={steps}", "train.global_batch=16", "optim.warmup_steps=19", "optim.lr=6.7e-4", "log.every=1",
            f"engine.name={engine}", "optim.name=adamw",
            ranks=2, launcher=launcher,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        found.append(losses(run))
    assert len(found[0]) == steps
    for fsdp, zero3 in zip(*found, strict=True):
        assert zero3 == pytest.approx(fsdp, rel=1e-4)
