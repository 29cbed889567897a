"""What asks a run to stop: a signal, the file `stop` in its directory, its time limit, the end of its launcher."""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from pathlib import Path

from lejepa_scale.config import Config
from lejepa_scale.parallel import launch, process_group
from lejepa_scale.training.signals import NOW, SOON, StopSignal

logger = logging.getLogger(__name__)

FILE = "stop"
REASONS = (*NOW, *SOON, f"the file {FILE}", "run.max_hours", "the end of the launcher")
_FILE, _LIMIT, _LAUNCHER = REASONS[-3:]
_LOOK_SECONDS = 1.0  # between two looks at the file, the clock and the launcher


class StopRequest:
    """Asks each source: `reason` is one of REASONS, or empty. The file and the clock are rank 0's to look at, signals and
    the launcher every rank's. The time limit begins with it; a file that is there already is from before, and removed."""

    def __init__(self, config: Config, *signals: StopSignal) -> None:
        self._signals, self._launcher = signals, launch.Launcher()
        self._first, self._file = process_group.rank() == 0, config.run.dir / FILE
        hours = config.run.max_hours
        self._until = float("inf") if hours is None else time.monotonic() + 3600 * hours
        self._next = 0.0
        if self._first and _remove(self._file):
            logger.warning("%s is from before this start: it is removed, and the run goes on.", self._file)

    def reason(self) -> str:
        for one in self._signals:
            if one.asked:
                return one.name
        if (now := time.monotonic()) < self._next:
            return ""
        self._next = now + _LOOK_SECONDS
        if self._first and self._file.exists():
            return _FILE
        if self._first and now > self._until:
            return _LIMIT
        return "" if self._launcher.alive() else _LAUNCHER

    def met(self) -> None:
        """The run has stopped: the next one is not to."""
        if self._first:
            _remove(self._file)


def too_slow_to_stop(seconds: float, launcher: launch.Launcher, run_dir: Path) -> str:
    """What to tell of a save that took `seconds`, which `launcher` would not wait for."""
    longer = "--shutdown-timeout" if launcher.name == launch.TORCHRUN else ""
    return (
        f"a checkpoint takes {seconds:.0f} s to write, and {launcher.name} kills its ranks {launcher.patience:.0f} s after "
        f"it was told to stop{f', unless {longer} says otherwise' if longer else ''}: "
        + (f"start it with {longer} {3 * round(seconds) + 30}, or let" if longer else "let")
        + f" the run stop by itself: touch {run_dir / FILE}, or set run.max_hours."
    )


def _remove(path: Path) -> bool:
    with suppress(FileNotFoundError):
        os.unlink(path)
        return True
    return False
