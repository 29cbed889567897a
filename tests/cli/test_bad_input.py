"""What a user gets wrong: one paragraph that names it, a non-zero exit on every rank, no hang."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Command, small_config
from shardserver import serve
from tars import shard

from lejepa_scale.data.index.shards import index_shards

TRAIN = ROOT / "launchers/train.py"


def refused(result: Any, *needles: str) -> None:
    assert result.returncode not in (0, None)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1, result.stderr
    for needle in needles:
        assert needle in errors[0], errors[0]
    assert 'Traceback (most recent call last):\n  File "' + str(TRAIN) not in result.stderr


@pytest.mark.parametrize(
    ("overrides", "needles"),
    [
        (["objective.lamda=1"], ["objective.lamda", "objective.lambda"]),
        (["model.encoder=vit_smal_patch16_224"], ["vit_smal_patch16_224", "did you mean"]),
        (["data.shards=nowhere/x.tar"], ["nowhere/x.tar", "does not exist"]),
        (["data.shards=nowhere/*.tar"], ["nowhere/*.tar", "matches no shard"]),
        (["data.views.local.size=30"], ["30 px", "32 px"]),
        (["train.global_batch=10", "train.micro_batch=4"], ["10", "4"]),
    ],
)
def test_one_process(command: Command, tmp_path: Path, scenes: Path, overrides: list[str], needles: list[str]) -> None:
    path = command.config(small_config(tmp_path / "run", scenes))
    refused(command(TRAIN, "--config", path, *overrides), *needles)


def test_missing_configuration_file(command: Command) -> None:
    refused(command(TRAIN, "--config", "nowhere.yaml"), "nowhere.yaml")


def test_two_ranks_leave_together(command: Command, tmp_path: Path, scenes: Path) -> None:
    """Found before the process group starts (batch), and after, on rank 0 alone (shard)."""
    tree = small_config(tmp_path / "run", scenes, engine={"name": "ddp"})
    path = command.config(tree)
    refused(command(TRAIN, "--config", path, "train.global_batch=17", ranks=2, timeout=90), "17", "2 ranks")
    refused(command(TRAIN, "--config", path, "data.shards=gone.tar", ranks=2, timeout=90), "gone.tar")


def test_tar_without_images_and_cut_tar(command: Command, tmp_path: Path, scenes: Path) -> None:
    empty = shard(tmp_path / "words.tar", {"a.txt": b"hello"})
    path = command.config(small_config(tmp_path / "run", empty))
    refused(command(TRAIN, "--config", path), "words.tar", "no images")
    whole = next(scenes.glob("*.tar")).read_bytes()
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole[: len(whole) // 2])
    refused(command(TRAIN, "--config", path, f"data.shards={cut}"), "cut.tar")


def test_image_that_does_not_decode_is_skipped_and_counted(command: Command, tmp_path: Path, scenes: Path) -> None:
    with tarfile.open(next(scenes.glob("*.tar"))) as tar:
        good = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
    bad = shard(tmp_path / "bad.tar", {"zzz_broken.jpg": b"not an image", "zzz_broken.cls": b"3", **good})
    run = tmp_path / "run"
    path = command.config(small_config(run, bad, train={"steps": 3, "global_batch": 11}))  # one epoch of 33
    result = command(TRAIN, "--config", path)
    assert result.returncode == 0, result.stderr
    assert "zzz_broken" in result.stderr
    assert '"skipped_images": 1' in (run / "metrics.jsonl").read_text().splitlines()[-1]
    (fault,) = map(json.loads, (run / "quarantine.jsonl").read_text().splitlines())
    assert (fault["shard"], fault["key"]) == (str(bad), "zzz_broken")
    assert 1 <= fault["step"] <= 3
    hopeless = shard(tmp_path / "hopeless.tar", {f"{i}.jpg": b"no" for i in range(40)})
    for workers in (0, 1):
        result = command(TRAIN, "--config", path, f"data.shards={hopeless}", f"run.dir={tmp_path / str(workers)}",
                         f"data.workers={workers}")  # fmt: skip
        refused(result, "hopeless.tar", "16 images in a row")


def test_a_lost_network_stops_every_rank_and_names_the_shard(command: Command, tmp_path: Path, scenes: Path) -> None:
    """Two ranks read from a web server that goes down in mid-run: one error, a non-zero exit, no hang."""
    with serve() as server:
        for path in scenes.glob("*.tar"):
            server.files[path.name] = path.read_bytes()
        index_shards([server.url(name) for name in sorted(server.files)], index_dir=tmp_path / "index")
        server.fail_after = len(server.requests) + 40
        tree = small_config(tmp_path / "run", scenes, train={"steps": 100, "global_batch": 16}, engine={"name": "ddp"})
        tree["data"] |= {
            "shards": server.url("shard-{000000..000002}.tar"),
            "index_dir": str(tmp_path / "index"),
            "retries": 1,
            "read_timeout": 2,
        }
        result = command(TRAIN, "--config", command.config(tree), ranks=2, timeout=120)
        refused(result, "shard-00000", "HTTP status 503", "given up after 2 attempts")
        assert (tmp_path / "run/metrics.jsonl").read_text().count("loss_sigreg") >= 1


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(command: Command, tmp_path: Path, scenes: Path) -> None:
    run = tmp_path / "run"
    path = command.config(small_config(run, scenes, checkpoint={"every": 2, "keep": 5}))
    assert command(TRAIN, "--config", path).returncode == 0
    damaged = [run / f"checkpoints/step_0000000{step}" for step in (4, 2)]
    flip(damaged[0] / "model.safetensors")
    more = ("--config", path, "train.steps=5")
    result = command(TRAIN, *more, "engine.name=ddp", ranks=2, timeout=90)
    assert result.returncode == 0, result.stderr
    assert f"{damaged[0] / 'model.safetensors'} is corrupt" in result.stderr
    assert f"It is now {damaged[0]}.damaged; the run goes on from the one before, {damaged[1]}" in result.stderr
    assert "resuming from" in result.stderr
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        *("step_00000002", "step_00000004", "step_00000004.damaged", "step_00000005")
    ]
    for step in (2, 4, 5):
        flip(run / f"checkpoints/step_0000000{step}/config.yaml")
    result = command(TRAIN, *more, "train.steps=6")
    refused(result, f"no checkpoint of {run} is sound", "step_00000002", "step_00000005", "run.resume=never")
    assert '"step": 5' in (run / "metrics.jsonl").read_text()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1  # one bit
    path.write_bytes(data)


def test_a_run_never_begins_again_unasked(command: Command, tmp_path: Path, scenes: Path) -> None:
    """Where its checkpoints have vanished; where it was ended before its first one, it does."""
    run = tmp_path / "run"
    path = command.config(small_config(run, scenes, checkpoint={"every": 2}))
    assert command(TRAIN, "--config", path).returncode == 0
    before = (run / "metrics.jsonl").read_text()
    shutil.rmtree(run / "checkpoints")
    refused(
        command(TRAIN, "--config", path), f"{run} has taken 4 steps, and no complete checkpoint", "run.resume=never"
    )
    assert (run / "metrics.jsonl").read_text() == before
    anew = command(TRAIN, "--config", path, "run.resume=never")
    assert anew.returncode == 0, anew.stderr
    (aside,) = run.glob("before_*")
    assert f"what {run} held is now in {aside}" in anew.stderr
    assert (aside / "metrics.jsonl").read_text() == before
    shutil.rmtree(run / "checkpoints")
    (run / "last_checkpoint").unlink()
    late = command(TRAIN, "--config", path, "checkpoint.every=100")
    assert late.returncode == 0, late.stderr
    assert "was ended in step 4, before its first checkpoint: starting at step 0" in late.stderr


def test_a_torn_line_of_metrics_is_left_out(command: Command, tmp_path: Path, scenes: Path) -> None:
    """Half a line, or zeros in its place, as a crash of the system leaves."""
    run = tmp_path / "run"
    path = command.config(small_config(run, scenes))
    assert command(TRAIN, "--config", path).returncode == 0
    metrics = run / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_bytes(whole.encode() + b'{"step": 5, "lo' + bytes(300))
    more = command(TRAIN, "--config", path, "train.steps=6")
    assert more.returncode == 0, more.stderr
    assert f"1 lines of {metrics} cannot be read" in more.stderr
    assert metrics.read_text().startswith(whole)
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def test_a_run_begins_from_the_checkpoint_of_another(command: Command, tmp_path: Path, scenes: Path) -> None:
    """run.resume=PATH: once; afterwards from its own. Back into its own past a run does not go."""
    path = command.config(small_config(tmp_path / "one", scenes, checkpoint={"every": 2, "keep": 9}))
    assert command(TRAIN, "--config", path).returncode == 0
    second = tmp_path / "one/checkpoints/step_00000002"
    words = ("--config", path, f"run.dir={tmp_path / 'two'}", f"run.resume={second}")
    result = command(TRAIN, *words)
    assert result.returncode == 0, result.stderr
    assert f"resuming from {second} (step 2)" in result.stderr
    records = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert [r["loss"] for r in records[1]] == [r["loss"] for r in records[0]][2:]
    again = command(TRAIN, *words, "train.steps=6")
    assert "run.resume is not used: the run has a checkpoint of its own" in again.stderr
    assert f"resuming from {tmp_path / 'two/checkpoints/step_00000004'}" in again.stderr
    refused(command(TRAIN, "--config", path, f"run.resume={second}"), "lies in the run itself", "another run.dir")
    refused(
        command(TRAIN, *words[:2], f"run.dir={tmp_path / 'x'}", "run.resume=nowhere"), "neither a complete checkpoint"
    )


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_disk_that_is_full_stops_the_run_or_does_not(
    command: Command, tmp_path: Path, scenes: Path, on_error: str
) -> None:
    """The folder of checkpoints is a file: nothing can be written there."""
    run = tmp_path / "run"
    tree = small_config(run, scenes, engine={"name": "ddp"}, checkpoint={"every": 2, "on_error": on_error})
    run.mkdir()
    (run / "checkpoints").touch()
    result = command(TRAIN, "--config", command.config(tree), ranks=2)
    refused(result, "step 4 is not saved" if on_error == "continue" else "step 2 is not saved", f"{run}/checkpoints")
    assert ("The run goes on (checkpoint.on_error = continue)" in result.stderr) == (on_error == "continue")


def test_checkpoint_of_another_model_and_other_shards(command: Command, tmp_path: Path, scenes: Path) -> None:
    path = command.config(small_config(tmp_path / "run", scenes))
    assert command(TRAIN, "--config", path).returncode == 0
    more = ("--config", path, "train.steps=5")
    refused(command(TRAIN, *more, "model.projector.dim=9"), "do not belong to this model", "projector")
    fewer = sorted(scenes.glob("*.tar"))[0]
    refused(command(TRAIN, *more, f"data.shards={fewer}"), "data.shards", "start a new run.dir")


def test_runaway_learning_rate_stops_with_advice(command: Command, tmp_path: Path, scenes: Path) -> None:
    tree = small_config(
        tmp_path / "run", scenes, train={"steps": 60, "max_nonfinite": 2}, optim={"lr": 1e30, "weight_decay": 0.0}
    )
    refused(command(TRAIN, "--config", command.config(tree)), "2 non-finite steps in a row", "optim.lr")
