"""Programs that a test starts, with all that they start in turn: found by a mark in their environment, whoever their parent
is by now."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_MARK = "LEJEPA_TEST_PROGRAM"


class Program:
    """A running program and its family."""

    def __init__(self, arguments: list[str], environment: dict[str, str], **options: Any) -> None:
        self._mark = uuid.uuid4().hex
        options |= {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(arguments, env={**environment, _MARK: self._mark}, **options)
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self._lines.put(line)

    def line(self, seconds: float = 60) -> str:
        """The next line that it prints; raises queue.Empty where none comes."""
        return self._lines.get(timeout=seconds)

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def family(self) -> list[int]:
        """Every living process that carries the mark."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if self._mark.encode() in path.read_bytes():
                    found.append(int(path.parent.name))
            except OSError:  # it has just ended, or is not ours
                pass
        return found

    def kill(self) -> None:
        for pid in self.family():
            with suppress(ProcessLookupError):  # it has ended by itself meanwhile
                os.kill(pid, signal.SIGKILL)

    def gone(self, seconds: float) -> bool:
        """Whether nobody of the family is left within that time."""
        return eventually(lambda: not self.family(), seconds)


_FORKS = """
import os, sys
{preamble}
for line in sys.stdin:
    if pid := os.fork():
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        continue
    os.setsid()  # its family is its session
    exec(eval(line))
    break
"""


class Forks:
    """A program that does `preamble` (imports) once, and then every piece of code in a fork of its own, which ends as any
    Python program does: with the interpreter's own exit."""

    def __init__(self, running: Program) -> None:
        self._running = running

    def start(self, code: str) -> int:
        """The process that runs `code`."""
        self._running.say(repr(code))
        return int(self._running.line())

    def status(self, seconds: float) -> int:
        """How it ended; raises queue.Empty where it does not."""
        return int(self._running.line(seconds))


@contextmanager
def forks(preamble: str, environment: dict[str, str]) -> Iterator[Forks]:
    with program([sys.executable, "-u", "-c", _FORKS.format(preamble=preamble)], environment) as running:
        yield Forks(running)


def session(leader: int) -> list[int]:
    """Processes of a session, but for those that have ended and wait to be reaped."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if (found := stat(pid)) and found[3] == str(leader) and found[0] != "Z"]


def stat(pid: int) -> list[str]:
    """State, parent, process group, session; nothing where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
    except OSError:
        return []


@contextmanager
def program(arguments: list[str], environment: dict[str, str], **options: Any) -> Iterator[Program]:
    """Run it; whatever is left of its family at the end is killed."""
    running = Program(arguments, environment, **options)
    try:
        yield running
    finally:
        running.kill()
        running.process.wait(30)


def eventually(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
