"""lejepa audit: whether a run really consumed the samples it should have."""

from __future__ import annotations

import argparse
from pathlib import Path

from lejepa_scale.cli.command import Command
from lejepa_scale.cli.order import step_range
from lejepa_scale.errors import UserError

_DESCRIPTION = """  lejepa audit runs/vitg                             duplicates, omissions and gaps in a run's own log
  lejepa audit order.tsv runs/vitg --steps 0:10      the first difference of two logs

A run keeps its log where data.log_keys=true; `lejepa order` prints what should be in it. One log: every position of its
steps must be there, no sample twice in an epoch, none missing from an epoch that is over, and what a restarted run took
again must agree. Two logs: the first position at which they differ.
Exit status: 0 all is well, 1 it is not, 2 a log cannot be read."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="run directory, or file that `order` printed")
    parser.add_argument("--steps", type=step_range, metavar="a:b", help="only this part of the logs")


def _run(arguments: argparse.Namespace) -> int:
    from lejepa_scale.data.audit.check import faults, first_difference, read_log, summary

    if len(arguments.logs) > 2:
        raise UserError(f"audit takes one log or two, not {len(arguments.logs)}.")
    logs = [read_log(path, arguments.steps) for path in arguments.logs]
    for log in logs:
        print(summary(log))
    if len(logs) == 1:
        found = faults(logs[0])
    else:
        difference = first_difference(*logs)
        found = [] if difference is None else [difference]
    for fault in found:
        print(f"FAULT: {fault}.")
    if not found:
        print("clean: every sample once" if len(logs) == 1 else "clean: the same samples at the same positions")
    return 1 if found else 0


COMMAND = Command("audit", "check which samples a run took", _DESCRIPTION, _add_arguments, _run, only_prints=True)
