"""lejepa watch: one run on one screen, while it trains."""

from __future__ import annotations

import argparse
from pathlib import Path

from lejepa_scale.cli.command import Command, positive, shown_again

_DESCRIPTION = """\
  lejepa watch runs/a                     again and again, until Ctrl-C: over ssh, in tmux
  lejepa watch runs/a --once              once: for a mail, a script

How far the run is and how long it will take; its curves; what a step's time goes to on each host, those first that the
others wait for; what it said last. Reads what the run has written, on any machine that sees the directory."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--every", type=positive, default=5, metavar="SECONDS", help="%(default)s")
    parser.add_argument("--once", action="store_true", help="print it once and leave")


def _run(a: argparse.Namespace) -> int:
    from lejepa_scale.operations.watching import screen

    return shown_again(lambda: screen(a.run), a.every, once=a.once)


COMMAND = Command(
    "watch", "one run on one screen, while it trains", _DESCRIPTION, _add_arguments, _run, only_prints=True
)
