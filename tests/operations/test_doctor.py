"""What `lejepa doctor` finds: each check with a good and a bad state, and all of them on two ranks."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarks.ports import free_port
from conftest import ROOT, small_config

from lejepa_scale.cli.main import main
from lejepa_scale.config import Config, dump, validate
from lejepa_scale.engine import extensions
from lejepa_scale.operations import doctor, doctor_ranks
from lejepa_scale.training.lock import locked

HOSTS = ["a", "a", "b", "b"]


def config_of(run: Path, shards: Path | str = "s", **sections: Any) -> Config:
    return validate(small_config(run, shards, **sections))


def test_cores_and_limits() -> None:
    assert doctor.cores(8, 2, 3).level == "ok"
    found = doctor.cores(8, 8, 4)
    assert (found.level, found.mend) == ("warning", "data.workers=1")
    assert doctor.open_files(65536).level == "ok"
    assert "ulimit -n" in doctor.open_files(1024).mend


def test_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(2**26, 0, 2**26))
    found = doctor.shared_memory(tmp_path)
    assert (found.level, found.said) == ("warning", f"64 MiB are free in {tmp_path}")
    assert "--shm-size" in found.mend
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(2**34, 0, 2**34))
    assert doctor.shared_memory(tmp_path).level == "ok"


def test_bytecode_that_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "site packages" / "torch" / "__init__.py"
    source.parent.mkdir(parents=True)
    source.write_text("x = 1\n")
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert "unset" not in doctor.bytecode(source).mend  # a folder that it may not write to
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    found = doctor.bytecode(source)
    assert found.level == "warning"
    assert str(source) in found.said
    assert "unset PYTHONDONTWRITEBYTECODE, or" in found.mend
    subprocess.run(shlex.split(found.mend.partition("for all: ")[2]), check=True, timeout=60)
    assert doctor.bytecode(source).level == "ok", "its advice helps"


def test_environment() -> None:
    assert doctor.environment({"PATH": "/bin"}, 1).level == "ok"
    assert "OMP_NUM_THREADS=1" in doctor.environment({}, 4).mend
    found = doctor.environment({"NCCL_IB_DISABLE": "1", "OMP_NUM_THREADS": "1"}, 8)
    assert found.level == "warning"
    assert found.said == "NCCL_IB_DISABLE=1, OMP_NUM_THREADS=1"


def test_hosts_that_differ_are_named() -> None:
    same = [{"torch": "2.13.0", "timm": "1.0"}] * 4
    assert doctor_ranks.the_same(same, HOSTS).level == "ok"
    found = doctor_ranks.the_same([*same[:3], {"torch": "2.12.0", "timm": "1.0"}], HOSTS)
    assert found.level == "wrong"
    assert found.said == "torch is 2.13.0, but not on rank 3 on b: 2.12.0"


def test_clocks_that_differ_are_named() -> None:
    assert doctor_ranks.clocks([10.0, 10.1, 10.2, 10.0], HOSTS).level == "ok"
    found = doctor_ranks.clocks([10.0, 10.1, 75.2, 75.0], HOSTS)
    assert (found.level, found.said) == ("warning", "a is 65 s behind b")


def test_a_run_directory_in_use(tmp_path: Path, unreadable: Callable[[Path], None]) -> None:
    config = config_of(tmp_path / "run")
    assert doctor.run_directory(config).level == "ok"
    with locked(tmp_path / "run"):
        found = doctor.run_directory(config)
        assert found.level == "wrong"
        assert f"pid {os.getpid()}" in found.said or str(os.getpid()) in found.said
    assert doctor.run_directory(config).level == "ok"
    unreadable(tmp_path / "run" / "lock")
    assert (found := doctor.run_directory(config)).level == "wrong"
    assert "run/lock cannot be read" in found.said


def test_room_for_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path / "run", checkpoint={"keep": 3})
    found = doctor.disk(config)
    assert found.level in ("ok", "warning")  # the latter on a slow disk
    assert str(tmp_path) in found.said
    assert list(tmp_path.iterdir()) == []
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(2**30, 0, 10**6))
    found = doctor.disk(config)
    assert found.level == "wrong"
    assert "checkpoint.keep=3" in found.mend


def test_a_slow_disk_and_a_clock_that_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path)
    monkeypatch.setattr(doctor, "_written", lambda folder: (2e7, 0.0))
    assert "checkpoint.mode=async" in doctor.disk(config).mend
    monkeypatch.setattr(doctor, "_written", lambda folder: (2e9, -90.0))
    assert "-90 s from this one" in doctor.disk(config).said
    monkeypatch.setattr(doctor, "_written", lambda folder: (2e9, 0.0))
    assert doctor.disk(config).level == "ok"


def test_shards_that_are_not_there(scenes: Path, tmp_path: Path) -> None:
    assert "3 shards" in doctor.shards(config_of(tmp_path, scenes)).said
    found = doctor.shards(config_of(tmp_path, tmp_path / "nothing"))
    assert found.level == "wrong"
    assert "nothing" in found.said


def test_locks_of_builds_that_were_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that nobody holds and that is old goes; one that is held, and one of a folder where something happens, stay."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    old = time.time() - 3600
    for name in ("dead", "held", "busy"):
        folder = tmp_path / "py311_cpu" / name
        folder.mkdir(parents=True)
        (folder / "build.ninja").touch()
        (folder / "lock").touch()
        for path in [*folder.iterdir()] if name != "busy" else [folder / "lock"]:
            os.utime(path, (old, old))
    with (tmp_path / "py311_cpu/held/lock").open():
        found = extensions.stale_locks()
        assert [path.parent.name for path in found] == ["dead"]
        assert doctor.build_locks(found).level == "warning"
        extensions.release_stale_locks()
    left = sorted(path.parent.name for path in tmp_path.glob("*/*/lock"))
    assert left == ["busy", "held"]
    assert doctor.build_locks([]).level == "ok"


def test_alone(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(dump(config_of(tmp_path / "run", scenes)))
    assert main(["doctor", "--config", str(path)]) == 0
    said = capsys.readouterr().out
    for what in ("versions", "cores", "open files", "checkpoints", "data.shards", "batch"):
        assert what in said
    assert not (tmp_path / "run").exists()
    assert main(["doctor", "--config", str(path), "data.shards=/nowhere/x.tar"]) == 2
    assert "wrong    data.shards" in capsys.readouterr().out


@pytest.mark.slow
def test_two_ranks(scenes: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(dump(config_of(tmp_path / "run", scenes, engine={"name": "ddp"})))
    words = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    done = subprocess.run(
        [sys.executable, *words, "-m", "lejepa_scale", "doctor", "--config", str(path)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for what in (
        "2 on 1 host have met",
        "the same on all ranks",
        "ms apart",
        "16 MiB over 2 ranks",
        "seen by all ranks",
    ):
        assert what in done.stdout
    assert not list(tmp_path.glob(".lejepa-doctor*"))
