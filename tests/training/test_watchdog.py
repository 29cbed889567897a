"""The watchdog: who is behind is named, stacks are left, and no wait is longer than the timeout."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import ROOT
from ranks import run_ranks

from lejepa_scale.errors import UserError
from lejepa_scale.parallel import living, process_group
from lejepa_scale.training import watchdog
from lejepa_scale.training.watchdog import Sign, Watchdog, described, in_words

ME = living.myself()
pytestmark = pytest.mark.unchecked


def until(happened: threading.Event, seconds: float = 20.0) -> None:
    assert happened.wait(seconds)


def test_a_wait_without_end_is_ended_and_leaves_its_stack(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ended, said = threading.Event(), list[str]()

    def end(paragraph: str) -> None:
        said.append(paragraph)
        ended.set()

    def waits_here() -> None:
        until(ended)

    with Watchdog(tmp_path, timedelta(seconds=0.4), end) as watch:
        watch.step(11)
        began = time.monotonic()
        with watch.doing("data wait"):
            waits_here()
        assert 0.4 < time.monotonic() - began < 5
    assert "step 12 has not moved for" in said[0]
    assert "rank 0: data wait for" in said[0]
    assert "engine.timeout_minutes = 0.00666667" in said[0]
    assert str(tmp_path / "hang") in said[0]
    stacks = (tmp_path / "hang/rank_0.txt").read_text()
    assert "waits_here" in stacks
    assert "step 12, data wait for" in stacks
    assert "step 12 has not moved" in caplog.text  # a warning, at half of the time


def test_what_may_take_its_time_and_what_goes_on_is_not_ended(tmp_path: Path) -> None:
    ended = threading.Event()
    with Watchdog(tmp_path, timedelta(seconds=0.3), lambda _: ended.set()) as watch:
        with watch.doing("saving", unlimited=True), watch.doing("a part of it", unlimited=True):
            time.sleep(0.8)
        for step in range(8):  # each far shorter than the timeout, together longer
            watch.step(step)
            with watch.doing("forward"):
                time.sleep(0.1)
        assert not ended.is_set()
        with watch.doing("saving", unlimited=True), watch.doing("a collective of it"):
            until(ended)


_STOPPED = """
import os, pathlib, sys, threading, time
from datetime import timedelta
from lejepa_scale.training.watchdog import Watchdog
with Watchdog(pathlib.Path(sys.argv[1]), timedelta(seconds=2)) as watch:
    watch.step(1)
    with watch.doing("data wait"):
        print("waits", flush=True)
        time.sleep(1)
        time.sleep(1)
print("goes on", flush=True)
"""


def test_a_process_that_was_stopped_and_woken_goes_on(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _STOPPED, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waits\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    said, _ = process.communicate(timeout=30)
    assert (process.returncode, said) == (0, "goes on\n")


def test_usual_is_ten_times_the_median_and_no_less_than_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now)
    watch = Watchdog(tmp_path, timedelta(minutes=60))
    watch._durations.clear()
    assert watch.usual() == 1800  # the first steps compile
    for number, seconds in enumerate([300.0, 2.0, 2.0, 2.0]):
        now += seconds
        watch.step(number)
    assert watch.usual() == 60
    for number in range(4, 60):
        now += 20.0
        watch.step(number)
    assert watch.usual() == 200
    short = Watchdog(tmp_path, timedelta(minutes=1))
    short._durations.extend([20.0] * 5)
    assert short.usual() == 30  # before the end, in any case


def test_a_step_that_takes_long_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watchdog, "AT_LEAST_SECONDS", 0.2)
    monkeypatch.setattr(watchdog, "_BEAT_SECONDS", 0.05)
    caplog.set_level(logging.WARNING)
    with Watchdog(tmp_path, timedelta(seconds=60)) as watch:
        for step in range(5):
            watch.step(step)
            time.sleep(0.01)
        with watch.doing("backward"):
            time.sleep(0.8)
    assert caplog.text.count("has not moved") == 1
    assert "where steps took 0.0" in caplog.text
    assert "rank 0: backward" in caplog.text


@pytest.mark.parametrize(
    ("signs", "silent", "said"),
    [
        (
            {
                0: Sign(1, 9, "other ranks", 61.0, ME),
                1: Sign(1, 9, "data wait", 62.4, ME),
                2: Sign(1, 9, "other ranks", 60.0, ME),
            },
            [],
            "rank 1: data wait for 62 s; ranks 0, 2: other ranks for 61 s",
        ),
        (
            {rank: Sign(1, 8 + (rank != 5), "backward", 70.0, ME) for rank in range(16)},
            [3],
            "rank 3: no sign of life; rank 5: backward of step 9 for 70 s; "
            "ranks 0, 1, 2, 4, 6, 7, 8, 9 and 6 more: backward for 70 s",
        ),
    ],
)
def test_those_that_are_behind_come_first(signs: dict[int, Sign], silent: list[int], said: str) -> None:
    assert described(signs, silent) == said


def _hangs(folder: str) -> list[str]:
    """The last rank waits for data, the others for it."""
    said, ended = list[str](), threading.Event()

    def end(paragraph: str) -> None:
        said.append(paragraph)
        ended.set()

    last = process_group.rank() == process_group.world_size() - 1
    with Watchdog(Path(folder), timedelta(seconds=1.5), end) as watch:
        watch.step(3)
        with watch.doing("data wait" if last else "other ranks"):
            until(ended)
            dist.barrier()  # a process that has ended does nothing else, and its thread signs no more
    return said


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_says_which_one_the_others_wait_for(tmp_path: Path, ranks: int) -> None:
    found = run_ranks(_hangs, ranks, str(tmp_path))
    for (said,) in found:
        assert f"rank {ranks - 1}: data wait for" in said
        assert said.index(f"rank {ranks - 1}: data wait") < said.index("other ranks for")
    assert sorted(path.name for path in (tmp_path / "hang").iterdir()) == [f"rank_{rank}.txt" for rank in range(ranks)]


def _lost(folder: str) -> list[str]:
    """The last rank gives signs, and then no more."""
    last = process_group.rank() == process_group.world_size() - 1
    watch = Watchdog(Path(folder), timedelta(seconds=2))
    with watch:
        time.sleep(0.5)
        dist.barrier()
        if last:
            watch._over.set()
            time.sleep(0.5)
        dist.barrier()
        try:
            if not last:
                with in_words(watch):
                    raise RuntimeError("[../gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1")
        except UserError as error:
            return [str(error)]
        finally:
            dist.barrier()
    return []


def test_a_rank_that_is_gone_is_named_in_place_of_its_address(tmp_path: Path) -> None:
    first, last = run_ranks(_lost, 2, str(tmp_path))
    assert last == []
    assert "the ranks have lost one another in step 1: rank 1 gave no sign of life" in first[0]
    assert "127.0.0.1" not in first[0]


def test_errors_that_are_no_collective_s_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="gloo"), in_words(Watchdog(tmp_path, timedelta(seconds=2))):
        raise RuntimeError("gloo, in a world of one")
    assert not watchdog._of_a_collective(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert watchdog._of_a_collective(dist.DistBackendError("NCCL communicator was aborted"))
    for said in ("Application timeout caused pair closure", "Timed out waiting 15000ms for recv operation to complete"):
        assert watchdog._of_a_collective(RuntimeError(said)), said  # gloo's words, without its name


class _Deaf:
    """The store of a rank 0 whose link is cut."""

    def check(self, keys: list[str]) -> bool:
        time.sleep(60)
        return False


def test_a_cut_link_does_not_hold_up_the_end(tmp_path: Path) -> None:
    """Nothing that the paragraph wants to know can be asked; the run ends all the same."""
    watch = Watchdog(tmp_path, timedelta(seconds=2))
    watch._answers, watch._ranks = _Deaf(), 2  # type: ignore[assignment]
    began = time.monotonic()
    said = watch._paragraph(9.0)
    assert time.monotonic() - began < 8
    assert "rank 0, whose store the ranks meet by, does not answer" in said
    assert "That is longer than engine.timeout_minutes" in said


_BUILDS_FOR_EVER = """
import sys, time
from pathlib import Path
from conftest import small_config
from lejepa_scale.config import validate
from lejepa_scale.training import loop

def waits_for_a_compiler(*_, **__):
    time.sleep(30)

loop.start_engine = waits_for_a_compiler
run, shards = map(Path, sys.argv[1:])
loop.train(validate(small_config(run, shards, engine={"name": "single", "precision": "fp32", "timeout_minutes": 0.03})))
"""


def test_what_comes_before_the_first_step_is_ended_too(tmp_path: Path, scenes: Path) -> None:
    (script := tmp_path / "script.py").write_text(_BUILDS_FOR_EVER)
    path = ":".join(str(ROOT / folder) for folder in (".", "tests", "tools"))
    done = subprocess.run(
        [sys.executable, script, tmp_path / "run", scenes],
        capture_output=True, text=True, timeout=120, cwd=ROOT, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "step 1 has not moved for" in done.stderr
    assert "That is longer than engine.timeout_minutes = 0.03" in done.stderr
    assert "rank 0: building the engine for" in done.stderr
    assert "waits_for_a_compiler" in (tmp_path / "run/hang/rank_0.txt").read_text()
