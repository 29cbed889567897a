"""Signals as a wish to stop, which the loop meets at its next step."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

SOON = ("SIGUSR1", "SIGUSR2")  # a scheduler's warning, which nobody sends to end a process at once
NOW = ("SIGTERM", "SIGINT", "SIGHUP")
# Launchers send what they were sent once more (deepspeed after 0.1 s, torchrun beside the terminal's own Ctrl-C)
GRACE_SECONDS = {"SIGTERM": 30.0, "SIGINT": 3.0}


class StopSignal:
    """Inside, the first signal of `names` is remembered, and nothing else happens. A SIGTERM or SIGINT that comes later than
    GRACE_SECONDS after it acts as usual: whoever sends it does not want to wait. What the process was started to ignore
    (nohup, a job in the background) stays ignored."""

    def __init__(self, *names: str) -> None:
        self.name = ""  # of the first one
        self._names, self._first = names or (*NOW, *SOON), 0.0

    @property
    def asked(self) -> bool:
        return bool(self.name)

    def __enter__(self) -> StopSignal:
        known = [signal.Signals[name] for name in self._names if hasattr(signal, name)]  # Windows has two of them
        self._before = {s: handler for s in known if (handler := signal.getsignal(s)) != signal.SIG_IGN}
        for s in self._before:
            signal.signal(s, self._ask)
        return self

    def _ask(self, number: int, _: FrameType | None) -> None:
        received, now = signal.Signals(number), time.monotonic()
        if not self.name:
            self.name, self._first = received.name, now
        elif now - self._first > GRACE_SECONDS.get(received.name, float("inf")):
            signal.signal(received, self._before[received])
            os.kill(os.getpid(), received)

    def __exit__(self, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)
