"""What a user gets wrong: one paragraph that names it, a non-zero exit on every rank, no hang."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Command, small_config
from shardserver import serve

from lejepa_scale.data.index.shards import index_shards

TRAIN = ROOT / "launchers/train.py"


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


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
    empty = write_tar(tmp_path / "words.tar", {"a.txt": b"hello"})
    path = command.config(small_config(tmp_path / "run", empty))
    refused(command(TRAIN, "--config", path), "words.tar", "no images")
    whole = next(scenes.glob("*.tar")).read_bytes()
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole[: len(whole) // 2])
    refused(command(TRAIN, "--config", path, f"data.shards={cut}"), "cut.tar")


def test_image_that_does_not_decode_is_skipped_and_counted(command: Command, tmp_path: Path, scenes: Path) -> None:
    with tarfile.open(next(scenes.glob("*.tar"))) as tar:
        good = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
    bad = write_tar(tmp_path / "bad.tar", {"zzz_broken.jpg": b"not an image", "zzz_broken.cls": b"3", **good})
    run = tmp_path / "run"
    path = command.config(small_config(run, bad, train={"steps": 3, "global_batch": 11}))  # one epoch of 33
    result = command(TRAIN, "--config", path)
    assert result.returncode == 0, result.stderr
    assert "zzz_broken" in result.stderr
    assert '"skipped_images": 1' in (run / "metrics.jsonl").read_text().splitlines()[-1]
    (fault,) = map(json.loads, (run / "quarantine.jsonl").read_text().splitlines())
    assert (fault["shard"], fault["key"]) == (str(bad), "zzz_broken")
    assert 1 <= fault["step"] <= 3
    hopeless = write_tar(tmp_path / "hopeless.tar", {f"{i}.jpg": b"no" for i in range(40)})
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


def test_corrupt_checkpoint_is_named_and_never_skipped_silently(command: Command, tmp_path: Path, scenes: Path) -> None:
    run = tmp_path / "run"
    path = command.config(small_config(run, scenes, checkpoint={"every": 2, "keep": 5}))
    assert command(TRAIN, "--config", path).returncode == 0
    model = run / "checkpoints/step_00000004/model.safetensors"
    data = bytearray(model.read_bytes())
    data[-5] ^= 1  # one bit
    model.write_bytes(data)
    more = ("--config", path, "train.steps=5")
    refused(command(TRAIN, *more, "engine.name=ddp", ranks=2, timeout=90), str(model), "corrupt", "delete")
    (model.parent / "COMPLETE").unlink()  # what an interrupted save leaves: the one before is taken
    result = command(TRAIN, *more)
    assert result.returncode == 0, result.stderr
    assert "step_00000002" in result.stderr


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
