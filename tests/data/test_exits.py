"""Every exit is bounded, and leaves no process behind: however the trainer ends, whatever its workers are doing."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Command, small_config, small_views
from processes import Program, eventually, program
from ranks import free_port

from lejepa_scale.config import BatchPlan, Data
from lejepa_scale.data import Loader, open_mixture, workers
from lejepa_scale.data.io.cache import Cache
from lejepa_scale.data.io.reader import Reader
from lejepa_scale.data.io.threads import Pool, result, within
from lejepa_scale.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")

SECONDS = 30.0  # in which everything is to be over, on a machine that does much else

# What a worker is doing when the trainer ends. `stuck` holds the interpreter too, so that no thread of it can run.
DOING = {
    "asleep": "time.sleep(1e6)",
    "stuck": "ctypes.PyDLL(None).sleep(1000)",
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "idle": "return read(self, url, *where, **options)",
}
# Imports once, then forks for every case: a line "what workers do, how the trainer ends, folder, shards". Reads hang from the
# fifth of each worker on.
SERVER = """
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
    exec(f"def act(self, url, *where, **options): {doing}", globals())
    return act(self, url, *where, **options)

Reader.read = hanging
for line in sys.stdin:
    doing, end, folder, shards = eval(line)
    if pid := os.fork():
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        continue
    os.setsid()  # its family is its session
    data = Data(shards=shards, workers=2)
    loader = Loader(open_mixture(data), data, BatchPlan(micro_batch=4), seed=0)
    batches = iter(loader)
    next(batches)
    Path(folder, "go").touch()
    while len(list(Path(folder).glob("*.flag"))) < 2:
        time.sleep(0.02)
    exec(end)
    break
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
def server() -> Iterator[Program]:
    with program([sys.executable, "-u", "-c", SERVER], environment()) as running:
        yield running


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def session(leader: int) -> list[int]:
    """Processes of a session, but for those that have ended and wait to be reaped."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(number) == leader and state != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize(("doing", "end"), CASES)
def test_no_worker_outlives_its_trainer(server: Program, scenes: Path, tmp_path: Path, doing: str, end: str) -> None:
    code, status = ENDS[end]
    open_mixture(Data(shards=str(scenes)))  # indexed
    asked = (DOING[doing], code, str(tmp_path), str(scenes))
    server.say(repr(asked))
    leader = int(server.line())
    assert eventually(lambda: len(list(tmp_path.glob("*.flag"))) == 2, 60)
    assert int(server.line(SECONDS)) == status
    assert eventually(lambda: not session(leader), SECONDS), f"left: {session(leader)}"
