"""`bench.py faults`: what it injects does happen, and its rows tell a run that came through from one that did not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from benchmarks import faults
from benchmarks.faults.cases import FAULTS
from benchmarks.faults.small_run import audited, ended, last_step, newest, said, saved_step
from benchmarks.faults.victims import Victim
from conftest import ROOT, Command, small_config

from lejepa_scale.config import validate
from lejepa_scale.errors import UserError
from lejepa_scale.training import loop


def test_faults_are_found_by_parts_of_their_names() -> None:
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names) >= 24
    with pytest.raises(UserError, match=r"no fault is called 'SIGTREM': SIGTERM to the launcher; "):
        next(faults.inject(["python"], ["disk", "SIGTREM"], 2))


def test_what_is_read_of_a_run(tmp_path: Path, scenes: Path) -> None:
    run = tmp_path / "run"
    assert (last_step(run), saved_step(run)) == (0, 0)
    loop.train(validate(small_config(run, scenes, train={"steps": 5, "global_batch": 16}, checkpoint={"every": 3})))
    assert (last_step(run), saved_step(run)) == (5, 5)
    assert last_step(run, since=time.time() + 60) == 0
    assert newest(run).name == "step_00000005"


def test_the_line_of_ours_is_told_from_the_launcher_s(tmp_path: Path) -> None:
    (log := tmp_path / "log").write_text("  3%|#  |\rerror: the disk is full\nsubprocess.CalledProcessError: 1\n")
    assert said(log) == "error: the disk is full"
    log.write_text("RuntimeError: gone\n")
    assert said(log) == "RuntimeError: gone"


def test_a_run_that_does_not_end_says_so(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    assert ended(process, 0.2) == "runs on after 0.2 s"
    Victim(tmp_path, process, tmp_path / "log", "lejepa_scale").kill_all()
    assert ended(process, 20) == -9


_PARTS = """
import importlib, os, time, torch
from lejepa_scale.data.batch import Batch
own, clock = Batch.augmented, time.time
from benchmarks.faults import broken
for part, rank in (("clock", 1), ("nan", 1), ("nan", 0)):
    os.environ |= {"FAULT": part, "RANK": str(rank)}
    Batch.augmented, time.time = own, clock
    importlib.reload(broken)
    broken._augmented = lambda batch, device: [torch.ones(2)]
    broken._FILE.unlink(missing_ok=True)
    views = lambda: broken._not_a_number(None, None)[0].tolist()
    then, before = time.time(), views()
    broken._FILE.touch()
    print(round((then - time.time()) / 3600), Batch.augmented is broken._not_a_number, before, views())
"""


def test_parts_break_once_the_file_is_there(tmp_path: Path) -> None:
    path = f"{ROOT}:{ROOT / 'tools'}"
    more = {"FAULT": "clock", "FAULT_FILE": str(tmp_path / "broken"), "WORLD_SIZE": "2", "PYTHONPATH": path}
    words = [sys.executable, "-c", _PARTS]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **more}, timeout=200)
    assert done.stdout.splitlines() == [
        "1 False [1.0, 1.0] [nan, nan]",
        "0 True [1.0, 1.0] [nan, nan]",
        "0 True [1.0, 1.0] [1.0, 1.0]",  # not the last rank
    ], done.stderr


@pytest.mark.slow
def test_a_run_comes_through(command: Command, tmp_path: Path) -> None:
    words = ["--launchers", "torchrun", "--only", "batches of the last rank", "--json", tmp_path / "r.json"]
    result = command(ROOT / "tools/bench.py", "faults", *words, timeout=300)
    assert result.returncode == 0, result.stderr
    (row,) = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert (row["exit"], row["exit then"], row["left behind"], row["samples lost or repeated"]) == (1, 0, 0, "0")
    assert "non-finite steps in a row" in row["said"]
    assert torch.isfinite(torch.tensor(row["seconds to recover"]))


def test_an_audit_that_fails_is_a_row_in_its_own_words(tmp_path: Path) -> None:
    """Of a run that is not there `lejepa audit` says so on stderr, and nothing on stdout."""
    assert str(tmp_path) in audited(tmp_path / "none")
