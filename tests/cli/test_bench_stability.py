"""`bench.py stability`: a run that jumps, collapses or comes to no numbers is seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import stability
from conftest import ROOT, Command, small_config

from lejepa_scale.config import validate
from lejepa_scale.errors import UserError
from lejepa_scale.training.collapse import highest_rank, lowest_rank


def records(losses: list[float], rank: float = 20.0) -> list[dict[str, Any]]:
    return [{"loss": loss, "effective_rank": rank, "embedding_std": 1.0, "nonfinite_steps": 0} for loss in losses]


def test_the_largest_jump_after_the_beginning() -> None:
    losses = [9.0, 3.0, 5.0, *([1.0, 1.1] * 10)]
    losses[12] += 0.7
    row = stability.described(records(losses), 2.0, 0.1)
    assert row["at step"] == 13
    assert row["largest jump"] == pytest.approx(losses[12] - losses[11])
    assert row["usual change"] == pytest.approx(0.1)
    assert row["loss"] == losses[-1]
    assert not row["collapsed"]
    assert stability.described(records([1.0, 0.9, 0.8, 0.7] * 3), 2.0, 0.1)["largest jump"] == pytest.approx(0.3)


def test_a_collapse_that_is_over_by_the_end_counts() -> None:
    for at, collapsed in ((2, False), (17, True)):  # of the second half alone: a run may begin low
        kept = records([1.0] * 20)
        kept[at]["effective_rank"] = 1.5
        assert stability.described(kept, 2.0, 0.1)["collapsed"] is collapsed
    kept = records([1.0] * 20)
    kept[17]["embedding_std"] = 0.05
    assert stability.described(kept, 2.0, 0.1)["collapsed"]
    kept = records([1.0] * 20)
    kept[-1]["nonfinite_steps"] = 3
    assert stability.described(kept, 2.0, 0.1)["no numbers"] == 3


def test_the_floor_is_the_trainer_s(tmp_path: Path) -> None:
    config = validate(small_config(tmp_path, tmp_path, evaluation={"rank_floor": 0.1}))
    assert (highest_rank(config, 64), highest_rank(config, 9)) == (17, 8)
    assert lowest_rank(config, 64) == pytest.approx(2.6)
    assert lowest_rank(validate(small_config(tmp_path, tmp_path, evaluation={"rank_floor": 0})), 64) == 0


def test_encoders_that_there_are_not(tmp_path: Path) -> None:
    study = stability.Study(tmp_path, (), "", "", 1, ("ResNet", "MLP"), (8,), (0,), 1)
    with pytest.raises(UserError, match="MLP is none of the encoders: ResNet, ViT, ConvNeXt"):
        next(stability.measure(study))


@pytest.mark.slow
def test_every_encoder_trains_at_toy_size(command: Command, tmp_path: Path, scenes: Path) -> None:
    views = {"global": {"count": 2, "size": 32}, "local": {"count": 0}}  # 16 px are too few for this ConvNeXt
    tree = small_config(tmp_path / "run", scenes, data={"shards": str(scenes), "views": views})
    del tree["model"]["encoder"], tree["model"]["options"]
    words = ["--config", command.config(tree), "--train", scenes, "--test", scenes, "--json", tmp_path / "r.json"]
    more = ["--images", "256", "--batches", "16", "32", "--seeds", "3"]
    result = command(ROOT / "tools/bench.py", "stability", *words, *more, timeout=300)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [(row["case"], row["batch"], row["steps"]) for row in rows] == [
        (name, batch, 256 // batch) for name in stability.ENCODERS for batch in (16, 32)
    ]
    assert all(torch.isfinite(torch.tensor([row["loss"], row["largest jump"], row["knn"]])).all() for row in rows)
    assert "| ConvNeXt | 32 | 8 | 1 |" in result.stdout
