"""Programs that a test starts, with all that they start in turn: found by a mark in their environment, whoever their parent
is by now."""

from __future__ import annotations

import os
import queue
import runpy
import signal
import subprocess
import sys
import tempfile
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
        return _marked(self._mark)

    def kill(self) -> None:
        _kill(self.family())

    def gone(self, seconds: float) -> bool:
        """Whether nobody of the family is left within that time."""
        return eventually(lambda: not self.family(), seconds)


def _marked(mark: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it has just ended, or is not ours
            pass
    return found


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):  # it has ended by itself meanwhile
            os.kill(pid, signal.SIGKILL)


_FORKS = """
import os, sys
answers = os.fdopen(os.dup(1), "w", 1)  # to the test; whatever else is printed goes where errors go
os.dup2(2, 1)
{preamble}
for line in sys.stdin:
    if pid := os.fork():
        print("started", pid, file=answers)
        print("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers)
        continue
    answers.close()
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
        return self._answer("started", 240)  # the first one waits for the imports, on a machine that may be busy

    def status(self, seconds: float) -> int:
        """How it ended; raises queue.Empty where it does not."""
        return self._answer("ended", seconds)

    def _answer(self, kind: str, seconds: float) -> int:
        """The next of that kind: how a process ended that a failed test has left alone is passed over."""
        while True:
            word, number = self._running.line(seconds).split()
            if word == kind:
                return int(number)

    def run(
        self, words: list[str], folder: Path, environments: list[dict[str, str]], seconds: float
    ) -> subprocess.CompletedProcess[str]:
        """As `python WORDS` would: a script and its arguments, or -m and a module's name. In more than one environment, in
        as many processes at once, as torchrun does: when one fails, the others are ended, and the status is 1. After that
        many seconds it is killed, with whatever it has started, and subprocess.TimeoutExpired raised."""
        with tempfile.TemporaryDirectory() as scratch:
            files = [Path(scratch, name) for name in ("out", "err")]
            mark = uuid.uuid4().hex
            environments = [{**environment, _MARK: mark} for environment in environments]
            begin = f"processes.be({words!r}, {str(folder)!r}, {environments!r}, {[str(f) for f in files]!r})"
            leader = self.start(begin)
            try:
                status = self.status(seconds)
            except queue.Empty:
                raise subprocess.TimeoutExpired(words, seconds, *(f.read_bytes() for f in files)) from None
            finally:
                _kill([*session(leader), *_marked(mark)])
            return subprocess.CompletedProcess(words, status, *(f.read_text() for f in files))


def be(words: list[str], folder: str, environments: list[dict[str, str]], files: list[str]) -> None:
    """Turn this process into the program `python WORDS`, which prints into files; or, for more than one environment, into
    what waits for them all."""
    for descriptor, file in enumerate([os.devnull, *files]):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND), descriptor)
    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # a line at a time: python -u writes its end apart, and ranks share the file
        stream.reconfigure(line_buffering=True, write_through=False)
    environment = environments[0]
    if len(environments) > 1:
        running = {}
        for environment in environments:
            if not (pid := os.fork()):
                break
            running[pid] = environment
        else:
            sys.exit(_waited_for(set(running)))
    os.chdir(folder)
    os.environ.clear()
    os.environ |= environment
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, folder)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


def _waited_for(running: set[int]) -> int:
    """0 where all end well; else 1, when those that are left have been ended: they have 30 s for it."""
    failed, deadline = False, float("inf")
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        running.discard(pid)
        if status and not failed:
            failed, deadline = True, time.monotonic() + 30
            for other in running:
                os.kill(other, signal.SIGTERM)
        if time.monotonic() > deadline:
            _kill(list(running))
        if not pid:
            time.sleep(0.02)
    return int(failed)


@contextmanager
def forks(preamble: str, environment: dict[str, str]) -> Iterator[Forks]:
    with program([sys.executable, "-u", "-c", _FORKS.format(preamble=preamble)], environment) as running:
        yield Forks(running)


def session(leader: int) -> list[int]:
    """Processes of a session, but for those that have ended and wait to be reaped."""
    assert leader > 1, "that is the whole machine"
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
