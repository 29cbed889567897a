"""Every exit is bounded, and leaves no process behind: however the trainer ends, whatever its workers are doing."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, Command, launched, mostly_slow, script_environment, small_config
from processes import Forks, Program, eventually, forks, program, session, stat

from lejepa_scale.config import Data
from lejepa_scale.data import open_mixture
from lejepa_scale.data.order import Order

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")

SECONDS = 30.0  # in which everything is to be over, on a machine that does much else

# What a worker is doing when the trainer ends. `stuck` holds the interpreter too, so that no thread of it can run.
DOING = {
    "asleep": "time.sleep(1e6)",
    "stuck": "ctypes.PyDLL(None).sleep(1000)",
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "idle": "return read(self, url, *where, **options)",
}
# Reads hang from the fifth of each worker on.
PREAMBLE = """
import ctypes, itertools, os, signal, sys, threading, time
from pathlib import Path
from lejepa_scale.config import BatchPlan, Data
from lejepa_scale.data import Loader, open_mixture
from lejepa_scale.data.io.reader import Reader

read, count = Reader.read, itertools.count()

def hanging(self, url, *where, **options):
    if next(count) < 4:
        return read(self, url, *where, **options)
    while not Path(folder, "go").exists():  # the trainer has its batch
        time.sleep(0.02)
    Path(folder, f"{os.getpid()}.flag").touch()
    return act(self, url, *where, **options)

Reader.read = hanging
"""
CASE = """
folder = {folder!r}
def act(self, url, *where, **options): {doing}
data = Data(shards={shards!r}, workers=2)
loader = Loader(open_mixture(data), data, BatchPlan(micro_batch=4), seed=0)
batches = iter(loader)
next(batches)
Path(folder, "go").touch()
while len(list(Path(folder).glob("*.flag"))) < 2:
    time.sleep(0.02)
{end}
"""
# How the trainer ends, and its exit status.
ENDS: dict[str, tuple[str, int]] = {
    "returns": ("pass", 0),
    "closes": ("loader.close(); assert next(batches, None) is None", 0),
    "raises": ("raise ValueError", 1),
    "raises inside a context": ("with loader: raise ValueError", 1),
    "leaves at once": ("os._exit(3)", 3),
    "is killed": ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    "is told to": ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
    "iterates in a thread that ends": (
        "thread = threading.Thread(target=lambda: [more.append(iter(loader)), next(more[0])]); more = []; thread.start(); "
        "thread.join(); time.sleep(0.5); assert len(next(more[0]).keys) == 4; os.kill(os.getpid(), signal.SIGKILL)",
        -signal.SIGKILL,
    ),
}
CASES = [
    *(("asleep", end) for end in ENDS if "thread" not in end),
    *(("idle", end) for end in ("raises", "is killed", "iterates in a thread that ends")),
    *(("stopped", end) for end in ("returns", "is killed")),
    *(("stuck", end) for end in ("closes", "is killed")),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Forks]:
    with forks(PREAMBLE, script_environment()) as running:
        yield running


@pytest.mark.parametrize(("doing", "end"), CASES)
def test_no_worker_outlives_its_trainer(server: Forks, scenes: Path, tmp_path: Path, doing: str, end: str) -> None:
    code, status = ENDS[end]
    open_mixture(Data(shards=str(scenes)))  # indexed
    leader = server.start(CASE.format(folder=str(tmp_path), shards=str(scenes), doing=DOING[doing], end=code))
    assert eventually(lambda: len(list(tmp_path.glob("*.flag"))) == 2, 60)
    assert server.status(SECONDS) == status
    assert eventually(lambda: not session(leader), SECONDS), f"left: {session(leader)}"


# -- the trainer itself, and what its workers have started


def stalling(scenes: Path, tmp_path: Path) -> dict[str, Any]:
    """Data whose first 32 samples are a file's, and the next a command's that gives them once, to be indexed, and then no
    more: each rank's only worker sits in that read before the last of two steps is done."""
    shards, flag = sorted(scenes.glob("*.tar")), tmp_path / "indexed"
    command = f"pipe:test -e {flag} && sleep 100000 | cat; cat {shards[1]}"
    data = {"shards": [str(shards[0]), command], "shuffle_block": 1, "workers": 1, "read_timeout": 250, "retries": 0}
    for seed in range(100):
        order = Order([np.array([32, 32])], [1.0], seed, 1)
        if [x.shard for x in order.locate(range(64))] == [0] * 32 + [1] * 32:
            break
    open_mixture(Data(**data))
    flag.touch()
    return small_config(
        tmp_path / "run", [], data=data, run={"dir": str(tmp_path / "run"), "seed": seed}, train={"steps": 2}
    )


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(("ranks", "killed"), mostly_slow([(1, False), (2, False), (2, True)], (1, False)))
def test_a_run_ends_while_a_read_never_returns(
    scenes: Path, tmp_path: Path, command: Command, ranks: int, killed: bool
) -> None:
    """The run is over after its last step; the command that its workers read, and the command's own children, with it."""
    tree = stalling(scenes, tmp_path)
    if ranks > 1:
        tree["engine"]["name"] = "ddp"
    if killed:
        tree["train"]["steps"] = 3  # which waits for the command
    head = [sys.executable, *(launched(ranks) if ranks > 1 else [])]
    arguments = [*head, str(ROOT / "launchers/train.py"), "--config", str(command.config(tree))]
    with program(arguments, script_environment()) as running:
        if killed:
            assert eventually(lambda: len(sleeping(running)) == 1, 120)  # one process of the node reads a command
            for pid in ranks_of(running):
                os.kill(pid, signal.SIGKILL)
            assert running.process.wait(SECONDS) != 0
        else:
            assert running.process.wait(120) == 0
            assert '"step": 2' in (tmp_path / "run/metrics.jsonl").read_text()
        assert running.gone(SECONDS), f"left: {[command_line(pid) for pid in running.family()]}"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_lost_worker_ends_the_run_on_every_rank(
    scenes: Path, tmp_path: Path, command: Command, number: signal.Signals
) -> None:
    """Rank 0 says what happened to rank 1's worker, long before it would give up its collective."""
    data = {"shards": str(scenes), "workers": 1, "read_timeout": 1}
    tree = small_config(tmp_path / "run", [], data=data, run={"dir": str(tmp_path / "run")}, train={"steps": 100_000})
    tree["engine"]["name"] = "ddp"
    arguments = [sys.executable, *launched(2), str(ROOT / "launchers/train.py"), "--config", str(command.config(tree))]
    with (tmp_path / "errors").open("w") as errors, program(arguments, script_environment(), stderr=errors) as running:
        metrics = tmp_path / "run/metrics.jsonl"
        assert eventually(lambda: metrics.exists() and '"step": 2' in metrics.read_text(), 120)
        ranks = {int(environment(pid)["RANK"]): pid for pid in ranks_of(running)}
        (worker,) = (pid for pid in running.family() if stat(pid)[1:2] == [str(ranks[1])])
        os.kill(worker, number)
        assert running.process.wait(60) != 0
        assert running.gone(SECONDS), f"left: {[command_line(pid) for pid in running.family()]}"
    says = {signal.SIGSTOP: "has shown no sign of life", signal.SIGKILL: r"was killed \(SIGKILL\)"}[number]
    text = (tmp_path / "errors").read_text()
    assert re.search(rf"no batch came for step \d+: worker 0 of rank 1 {says}", text), text


def environment(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def sleeping(running: Program) -> list[int]:
    return [pid for pid in running.family() if command_line(pid).startswith("sleep ")]


def ranks_of(running: Program) -> list[int]:
    """The launcher's own children; their workers, forks of them, have the same command line."""
    return [pid for pid in running.family() if stat(pid)[1:2] == [str(running.process.pid)]]
