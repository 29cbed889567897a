"""The recipe for real photographs, in small. Skipped where the photographs are not at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT, Command, photographs

from lejepa_scale.data import evaluation_batches
from lejepa_scale.evaluation import knn_accuracy, raw_pixels

PHOTOGRAPHS = photographs("cifar10_subset.tar")
pytestmark = pytest.mark.skipif(
    not PHOTOGRAPHS.exists(), reason=f"{PHOTOGRAPHS} is absent; LEJEPA_TEST_DATA names the folder that holds it"
)


@pytest.fixture
def shards(command: Command, tmp_path: Path) -> dict[str, Path]:
    out = {split: tmp_path / split for split in ("train", "test")}
    for split, folder in out.items():
        arguments = ("tar", PHOTOGRAPHS, "--prefix", f"{split}/", "--out", folder)
        assert command(ROOT / "tools/make_shards.py", *arguments).returncode == 0
    return out


def test_raw_pixels_score_what_is_known(shards: dict[str, Path]) -> None:
    """Cosine 20-NN on raw pixels: about 39 %, measured independently of this project."""
    train, test = (
        raw_pixels(evaluation_batches([str(shards[split])], image_size=32, batch_size=500))
        for split in ("train", "test")
    )
    assert (len(train.rows), len(test.rows)) == (10_000, 2_000)
    assert knn_accuracy(train, test, k=20) == pytest.approx(0.39, abs=0.015)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_minute_of_training_helps(command: Command, shards: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = command(
        ROOT / "launchers/train.py", "--config", ROOT / "configs/vits_cifar10.yaml", f"run.dir={run}",
        f"data.shards={shards['train']}", "train.steps=100", "optim.warmup_steps=10", ranks=2, timeout=900,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    result = command(ROOT / "tools/evaluate.py", run, "--train", shards["train"], "--test", shards["test"])
    assert result.returncode == 0, result.stderr
    scores = {row["name"]: row for row in json.loads((run / "evaluation.json").read_text())}
    assert scores["trained"]["linear"] > scores["untrained"]["linear"] + 0.02
