"""Each fault injected into a run of its own under each launcher, and the same command given once more."""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.faults import small_run
from benchmarks.faults.cases import FAULTS, Fault
from benchmarks.faults.victims import Command
from benchmarks.measure import Row
from lejepa_scale.errors import UserError

_MORE = 6  # steps that the next start takes
_STOP_SECONDS = 150.0


def inject(launchers: Sequence[str], only: Sequence[str], ranks: int) -> Iterator[Row]:
    """A row for each fault, or those in whose names one of `only` occurs, under each launcher. Raises UserError where a run
    does not begin."""
    if unknown := [name for name in only if all(name not in fault.name for fault in FAULTS)]:
        raise UserError(f"no fault is called {unknown[0]!r}: {'; '.join(fault.name for fault in FAULTS)}.")
    # whatever runs in the background or under nohup ignores these, and so would all that it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with tempfile.TemporaryDirectory() as base:
        shards = small_run.shards(Path(base))
        for fault in FAULTS:
            for launcher in launchers:
                if launcher in fault.where and (not only or any(name in fault.name for name in only)):
                    folder = Path(tempfile.mkdtemp(dir=base))
                    with fault.around(folder):
                        yield _case(fault, Command(launcher, 1 if launcher == "python" else ranks, folder, shards))


def _case(fault: Fault, command: Command) -> Row:
    environment = {name: value.format(folder=command.folder) for name, value in fault.environment.items()}
    overrides = [*fault.settings, *fault.overrides, "train.steps=1000000"]
    victim = command.started(overrides, environment, fault.until, fault.module)
    try:
        began = time.monotonic()
        fault.inject(victim)
        status = small_run.ended(victim.process, _STOP_SECONDS)
        seconds = time.monotonic() - began
        left = victim.orphans()
        row: Row = {
            "case": fault.name, "launcher": command.launcher, "exit": status, "seconds to stop": round(seconds, 1),
            "seconds until all are gone": round(time.monotonic() - began, 1), "left behind": left,
            "said": small_run.said(victim.log),
        }  # fmt: skip
    finally:
        victim.kill_all()
    fault.mend(victim)
    row |= _recovered(command, victim.run, fault.settings, environment)
    came_through = (row["left behind"], row["exit then"], row["samples lost or repeated"]) == (0, 0, "0")
    return row | {"ok": came_through and isinstance(status, int) and fault.holds(victim)}


def _recovered(command: Command, run: Path, settings: Sequence[str], environment: dict[str, str]) -> Row:
    """The same command once more, for some steps."""
    last, saved = small_run.last_step(run), small_run.saved_step(run)
    began = time.monotonic()
    again = command.started([*settings, f"train.steps={saved + _MORE}"], environment, until=saved + 1)
    recovered = time.monotonic() - began
    status = small_run.ended(again.process, _STOP_SECONDS)
    again.kill_all()
    return {
        "steps done again": max(0, last - saved), "seconds to recover": round(recovered, 1), "exit then": status,
        "samples lost or repeated": small_run.audited(run),
    }  # fmt: skip


def as_table(rows: Sequence[Row]) -> str:
    """Markdown."""
    names = [name for name in rows[0] if name != "section"]
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    return "\n".join([*lines, *(f"| {' | '.join(str(row.get(name, '')) for name in names)} |" for row in rows)])
