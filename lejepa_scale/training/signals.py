"""SIGTERM and SIGINT as a wish to stop, which the loop meets at its next step."""

from __future__ import annotations

import signal


class StopSignal:
    """Inside, the first SIGTERM or SIGINT raises the flag `asked`; a second one acts as usual."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> StopSignal:
        self._before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
        for s in self._before:
            signal.signal(s, self._ask)
        return self

    def _ask(self, signum: int, _: object) -> None:
        self.asked = True
        signal.signal(signum, self._before[signal.Signals(signum)])

    def __exit__(self, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)
