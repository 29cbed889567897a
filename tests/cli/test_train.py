"""The launcher as a user runs it: training, resuming, stopping, every engine's launcher."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, Command, mostly_slow, small_config
from PIL import Image
from safetensors.torch import load_file

from lejepa_scale.checkpoint import load_encoder

TRAIN = ROOT / "launchers/train.py"
KEYS = {
    "step", "loss", "loss_prediction", "loss_sigreg", "loss_normalized", "grad_norm", "lr", "samples",
    "images_per_second", "data_wait_fraction", "effective_rank", "probe_accuracy",
}  # fmt: skip


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_print_config_resolves_and_starts_nothing(command: Command, tmp_path: Path) -> None:
    result = command(TRAIN, "--config", command.config(small_config(tmp_path / "run", "none")), "--print-config")
    assert result.returncode == 0
    assert "knots: 17" in result.stdout
    assert not (tmp_path / "run").exists()


def test_help_teaches(command: Command) -> None:
    result = command(TRAIN, "--help")
    assert result.returncode == 0
    assert "torchrun" in result.stdout
    assert "train.steps=100" in result.stdout


def test_single_process_writes_what_the_contract_says(command: Command, tmp_path: Path, scenes: Path) -> None:
    run = tmp_path / "run"
    path = command.config(small_config(run, scenes, checkpoint={"every": 2, "keep": 1}, model={"drop_path": 0.3}))
    result = command(TRAIN, "--config", path)
    assert result.returncode == 0, result.stderr
    assert (
        "Attention by sdpa, 704 tokens of 64 views in a row; stochastic depth leaves a block 484 of them or more."
        in (result.stdout + result.stderr)
    )
    lines = records(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert set(lines[0]) >= KEYS
    assert lines[-1]["samples"] == 64
    assert lines[0]["loss_normalized"] == pytest.approx(lines[0]["loss"] / 0.05**0.4)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_00000004"]
    assert (run / "config.yaml").exists()
    again = command(TRAIN, "--config", path)
    assert again.returncode == 0
    assert "trained to step 4 already" in again.stderr
    encoder, _ = load_encoder(run)
    untrained, _ = load_encoder(run, weights="first")
    assert not any(
        p.allclose(q) for p, q in zip(encoder.parameters(), untrained.parameters(), strict=True) if p.ndim > 1
    )


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_resume_is_exact(command: Command, tmp_path: Path, scenes: Path, engine: str) -> None:
    """Six steps at once, and again from step 3: the same numbers and weights, bit for bit."""
    run = tmp_path / "run"
    tree = small_config(
        run,
        scenes,
        train={"steps": 6, "global_batch": 16, "micro_batch": 4},
        engine={"name": engine},
        model={"encoder": "vit_nano", "drop_path": 0.2, "patch_drop": {"global": 0.3, "local": 0.3}},
        checkpoint={"every": 3, "keep": 5},
    )
    path = command.config(tree)
    first = command(TRAIN, "--config", path, ranks=2)
    assert first.returncode == 0, first.stderr
    whole = records(run)
    last = run / "checkpoints/step_00000006"
    before = {path.name: load_file(path) for path in last.glob("*.safetensors")}
    assert len(before) == 5  # two ranks' weights and moments, and the probe
    shutil.rmtree(last)
    second = command(TRAIN, "--config", path, ranks=2)
    assert second.returncode == 0, second.stderr
    assert "resuming from" in second.stderr
    exact = ("step", "loss", "loss_prediction", "loss_sigreg", "grad_norm", "lr", "effective_rank", "probe_accuracy")
    assert [[r[k] for k in exact] for r in records(run)] == [[r[k] for k in exact] for r in whole]
    for name, tensors in before.items():
        after = load_file(last / name)
        assert after.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert tensor.equal(after[key]), f"{name}: {key}"


def test_engines_and_world_sizes_share_checkpoints(command: Command, tmp_path: Path, scenes: Path) -> None:
    """One rank to step 2, two FSDP ranks from there: the losses of one rank all along."""
    tree = small_config(tmp_path / "whole", scenes, checkpoint={"every": 2, "keep": 5})
    assert command(TRAIN, "--config", command.config(tree)).returncode == 0
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "whole", moved)
    shutil.rmtree(moved / "checkpoints/step_00000004")
    arguments = ("--config", command.config(tree), f"run.dir={moved}", "engine.name=fsdp")
    result = command(TRAIN, *arguments, ranks=2)
    assert result.returncode == 0, result.stderr
    assert "engine.name: single -> fsdp" in result.stderr
    losses = [[r["loss"] for r in records(tmp_path / name)] for name in ("whole", "moved")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(
    ("ask", "why", "environment", "status"),
    [
        ("SIGTERM", "SIGTERM", {}, 75),
        pytest.param(
            "SIGUSR1",
            "SIGUSR1",
            {"TORCHELASTIC_MAX_RESTARTS": "2", "TORCHELASTIC_RESTART_COUNT": "1"},
            0,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "stop",
            "the file stop",
            {"TORCHELASTIC_MAX_RESTARTS": "2", "TORCHELASTIC_RESTART_COUNT": "2"},
            75,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["SIGTERM", "a launcher that would start it again", "a file"],
)
def test_a_run_that_is_asked_to_stop_saves_and_the_same_command_goes_on(
    command: Command, tmp_path: Path, scenes: Path, ask: str, why: str, environment: dict[str, str], status: int
) -> None:
    run = tmp_path / "run"
    path = command.config(small_config(run, scenes, train={"steps": 100000}, data={"workers": 1}))
    process = subprocess.Popen(
        [sys.executable, str(TRAIN), "--config", str(path)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        env=os.environ | environment,
    )
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    if ask == "stop":
        (run / "stop").touch()
    else:
        process.send_signal(signal.Signals[ask])
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status, stderr
    (saved,) = (run / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("step_"))
    assert f"stopped after step {step} ({why}); saved".encode() in stderr
    assert (run / "exit_status").read_text() == "75\n"
    assert not (run / "stop").exists()
    result = command(TRAIN, "--config", path, f"train.steps={step + 1}")
    assert result.returncode == 0, result.stderr
    assert records(run)[-1]["step"] == step + 1
    assert (run / "exit_status").read_text() == "0\n"


def test_a_fault_while_training_is_no_mistake_of_the_configuration(
    command: Command, tmp_path: Path, scenes: Path
) -> None:
    """1, not 2; and nothing is left that says how it went."""
    run = tmp_path / "run"
    (tmp_path / "run").mkdir()
    (run / "exit_status").write_text("75\n")  # of the start before
    tree = small_config(run, scenes, train={"steps": 9, "max_nonfinite": 2}, optim={"lr": 1e30, "warmup_steps": 0})
    result = command(TRAIN, "--config", command.config(tree))
    assert result.returncode == 1, result.stderr
    assert "2 non-finite steps in a row" in result.stderr
    assert not (run / "exit_status").exists()
    assert (run / "nonfinite.jsonl").exists()


@pytest.mark.parametrize("encoder", mostly_slow(["vit_nano", "resnet18", "convnext_atto"], "convnext_atto"))
def test_other_encoders_train_with_the_same_configuration(
    command: Command, tmp_path: Path, scenes: Path, encoder: str
) -> None:
    """Only model.encoder differs: the loss falls, and the embeddings keep their rank."""
    run = tmp_path / encoder
    views = {
        "global": {"count": 2, "size": 32, "scale": [0.5, 1]},
        "local": {"count": 1, "size": 32, "scale": [0.2, 0.5]},
    }
    tree = small_config(
        run,
        scenes,
        train={"steps": 24, "global_batch": 32},
        data={"views": views},
        model={"encoder": encoder, "options": {}},
        optim={"lr": 1e-3},
    )  # fmt: skip
    result = command(TRAIN, "--config", command.config(tree))
    assert result.returncode == 0, result.stderr
    lines = records(run)
    losses = [line["loss"] for line in lines]
    assert sum(losses[-6:]) / 6 < 0.85 * sum(losses[:2]) / 2  # single steps differ by a tenth
    assert lines[-1]["effective_rank"] > 5  # of 17


def test_export_verify_evaluate_and_draw(command: Command, tmp_path: Path, scenes: Path) -> None:
    run = tmp_path / "run"
    assert command(TRAIN, "--config", command.config(small_config(run, scenes))).returncode == 0
    target = tmp_path / "encoder"
    result = command(ROOT / "tools/convert_checkpoint.py", run, target, "--verify")
    assert result.returncode == 0, result.stderr
    assert "verified with timm" in result.stdout
    result = command(ROOT / "tools/evaluate.py", run, "--train", scenes, "--test", scenes, "--k", 5)
    assert result.returncode == 0, result.stderr
    rows = json.loads((run / "evaluation.json").read_text())["results"]
    assert list(dict.fromkeys(row["subject"] for row in rows)) == ["trained", "untrained", "raw pixels"]
    result = command(ROOT / "tools/visualize.py", run, "--shards", scenes, "--out", tmp_path / "p.png", "--images", 3)
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "p.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[1] == 150 * 11  # inches, for three charts
    white = (pixels == 255).all(-1)
    assert 0.05 < white.mean() < 0.8  # images, maps and neighbours fill what is not margin


def test_wandb_is_offline_without_a_key(
    command: Command, tmp_path: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no key in a netrc either
    run = tmp_path / "run"
    path = command.config(small_config(run, scenes, train={"steps": 2}, log={"wandb": {"enabled": True}}))
    result = command(TRAIN, "--config", path)
    assert result.returncode == 0, result.stderr
    assert list((run / "wandb").glob("offline-run-*"))
