"""Programs that a test starts, with all that they start in turn: found by a mark in their environment, whoever their parent
is by now."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
            os.kill(pid, signal.SIGKILL)

    def gone(self, seconds: float) -> bool:
        """Whether nobody of the family is left within that time."""
        return eventually(lambda: not self.family(), seconds)


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
