"""The recipe for real photographs, in small. Skipped where the photographs are not at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT, Command, photographs

from lejepa_scale.data.evaluation import labelled_batches
from lejepa_scale.evaluation import knn, measure, raw_pixels

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
        raw_pixels(labelled_batches([str(shards[split])], image_size=32, batch_size=500)).labelled("pooled")
        for split in ("train", "test")
    )
    assert (len(train.rows), len(test.rows)) == (10_000, 2_000)
    assert measure(knn(train, test, (20,))[20], test.labels, 10).top1 == pytest.approx(0.39, abs=0.015)


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
    rows = json.loads((run / "evaluation.json").read_text())["results"]
    scores = {row["subject"]: row["metrics"]["top1"] for row in rows if row["protocol"] == "logistic"}
    assert scores["trained"] > scores["untrained"] + 0.02
