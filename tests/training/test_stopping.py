"""What asks a run to stop: signals, a file, a clock, a launcher that is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import small_config
from ranks import run_ranks

from lejepa_scale.config import validate
from lejepa_scale.parallel import process_group
from lejepa_scale.parallel.launch import Launcher
from lejepa_scale.training import signals, stopping
from lejepa_scale.training.actions import Stop
from lejepa_scale.training.signals import NOW, SOON, StopSignal
from lejepa_scale.training.stopping import StopRequest


def request_of(folder: Path, *of: StopSignal, **run: Any) -> StopRequest:
    config = validate(small_config(folder, "s"))
    return StopRequest(config.model_copy(update={"run": config.run.model_copy(update=run)}), *of)


@pytest.mark.parametrize("name", [*NOW, *SOON])
def test_a_signal_is_a_wish(tmp_path: Path, name: str) -> None:
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with StopSignal() as asked:
        request = request_of(tmp_path, asked)
        assert not request.reason()
        for _ in range(3):  # the later ones within the time of grace
            os.kill(os.getpid(), number)
        assert request.reason() == name
    assert signal.getsignal(number) is before


def test_the_first_of_several_signals_is_the_reason(tmp_path: Path) -> None:
    with StopSignal(*SOON) as soon, StopSignal(*NOW) as now:
        request = request_of(tmp_path, soon, now)
        for name in ("SIGUSR2", "SIGUSR1"):
            os.kill(os.getpid(), signal.Signals[name])
        assert request.reason() == "SIGUSR2"


@pytest.mark.parametrize(
    ("name", "usual"), [("SIGTERM", True), ("SIGINT", True), ("SIGHUP", False), ("SIGUSR1", False)]
)
def test_a_late_second_signal_acts_as_usual(name: str, usual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM and SIGINT: whoever sends one half a minute later does not want to wait any longer."""
    monkeypatch.setattr(signals, "GRACE_SECONDS", {"SIGTERM": 0.05, "SIGINT": 0.05})
    number, acted = signal.Signals[name], list[int]()
    before = signal.signal(number, lambda *_: acted.append(1))
    try:
        with StopSignal():
            os.kill(os.getpid(), number)
            time.sleep(0.1)
            assert not acted
            os.kill(os.getpid(), number)
        assert bool(acted) == usual
    finally:
        signal.signal(number, before)


def test_what_was_ignored_stays_ignored() -> None:
    """nohup ignores SIGHUP for what it starts, so that it goes on when the terminal is closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not asked.asked
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_file_asks_and_goes_when_it_is_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stopping, "_LOOK_SECONDS", 0.0)
    (tmp_path / "stop").touch()
    request = request_of(tmp_path)
    assert f"{tmp_path / 'stop'} is from before this start" in caplog.text
    assert not request.reason()
    (tmp_path / "stop").touch()
    assert request.reason() == "the file stop"
    request.met()
    assert not (tmp_path / "stop").exists()
    assert not request.reason()


def test_a_time_limit_is_met_and_no_disk_is_asked_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    request = request_of(tmp_path, max_hours=0.5)
    looks = []
    monkeypatch.setattr(Path, "exists", lambda self: bool(looks.append(self)))  # type: ignore[func-returns-value]
    for step in range(100):
        now = 1000.0 + 0.1 * step
        assert not request.reason()
    assert len(looks) == 10  # one a second
    now = 1000.0 + 1799.0
    assert not request.reason()
    now = 1000.0 + 1801.0
    assert request.reason() == "run.max_hours"
    assert not request_of(tmp_path).reason()


def _reasons(folder: str) -> list[str]:
    """Three ranks, one after the other: the file is looked at by rank 0, a signal reaches rank 1 alone. Then at once."""
    stopping._LOOK_SECONDS = 0.0
    rank, heard = process_group.rank(), []
    with StopSignal() as asked:
        stop = Stop(request_of(Path(folder), asked))
        heard.append(stop.at_once())
        if rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        heard.append(stop.at_once())
        asked.name = ""
        if rank == 0:
            Path(folder, "stop").touch()
        heard.append(stop.at_once())
        heard.append(str(Path(folder, "stop").exists() and rank == 0))
    return heard


@pytest.mark.unchecked
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_hears_why_from_the_one_that_was_asked(tmp_path: Path, ranks: int) -> None:
    assert run_ranks(_reasons, ranks, str(tmp_path)) == [["", "SIGUSR1", "the file stop", "False"]] * ranks


_RANK = """
import sys, time
sys.path.insert(0, {root!r})
from lejepa_scale.parallel.launch import Launcher
launcher = Launcher()
print(launcher.name, launcher.alive(), flush=True)
for _ in range(200):
    time.sleep(0.05)
    if not launcher.alive():
        break
print(launcher.alive(), flush=True)
"""
# what `deepspeed` is: a process that starts one a host, which starts the ranks
_MIDDLE = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[2]]).wait()"
_TOP = """import subprocess, sys
subprocess.Popen([sys.executable, '-c', {middle!r}, 'deepspeed.launcher.launch', sys.argv[2]]).wait()"""


@pytest.mark.parametrize(
    ("top", "environment", "name", "noticed"),
    [
        (_MIDDLE, {"TORCHELASTIC_RUN_ID": "a", "RANK": "0"}, "torchrun", True),
        (_MIDDLE, {"RANK": "0"}, "", False),  # ranks that a script starts, and leaves
        (_MIDDLE, {}, "", False),
        (_TOP.format(middle=_MIDDLE), {"RANK": "0"}, "deepspeed", True),
    ],
    ids=["torchrun", "by hand", "python", "deepspeed"],
)
def test_a_launcher_that_is_gone_is_noticed(top: str, environment: dict[str, str], name: str, noticed: bool) -> None:
    root = str(Path(__file__).parents[2])
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "TORCHELASTIC_RUN_ID")}
    rank = _RANK.format(root=root).replace("range(200)", "range(200)" if noticed else "range(20)")
    launcher = subprocess.Popen(
        [sys.executable, "-c", top, "deepspeed", rank], stdout=subprocess.PIPE, text=True, env=clean | environment
    )
    assert launcher.stdout is not None
    try:
        assert launcher.stdout.readline().split() == [*([name] if name else []), "True"]
        launcher.kill()
        launcher.wait()
        assert launcher.stdout.readline().strip() == str(not noticed)
    finally:
        launcher.stdout.close()


def test_without_a_launcher_nobody_is_in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert (Launcher().name, Launcher().patience) == ("", 0.0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    assert Launcher().patience == 30.0
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")
    launcher = Launcher()
    assert launcher.patience == 120.0
    notice = stopping.too_slow_to_stop(200.0, launcher, Path("runs/a"))
    assert "start it with --shutdown-timeout 630, or let the run stop by itself: touch runs/a/stop" in notice
    launcher.name = "deepspeed"
    assert "told to stop: let the run stop by itself" in stopping.too_slow_to_stop(200.0, launcher, Path("runs/a"))
