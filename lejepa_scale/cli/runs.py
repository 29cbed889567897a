"""lejepa runs: which runs there are, and how each stands."""

from __future__ import annotations

import argparse
from pathlib import Path

from lejepa_scale.cli.command import Command, positive, shown_again

_DESCRIPTION = """  lejepa runs                            those below runs/
  lejepa runs runs sweeps/a              of these folders, or run directories
  lejepa runs runs --watch               the same, again and again, until Ctrl-C: over ssh, in tmux
  lejepa runs runs --json | jq           for programs

state: running; silent (whoever holds its lock gives no sign of life); finished; stopped (saved; the same command goes
on); ended (a fault, or killed: the same command goes on from its newest checkpoint); unreadable (what cannot be read is
named below the table). score: the best k-NN or linear accuracy of its evaluations, else of the online probe. Reads what runs
have written, and asks no process."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", nargs="*", type=Path, metavar="FOLDER", help="run directories, or folders of them (runs)"
    )
    parser.add_argument("--watch", action="store_true", help="show the table anew every --every seconds")
    parser.add_argument("--every", type=positive, default=10, metavar="SECONDS", help="%(default)s")
    parser.add_argument("--json", action="store_true", help="a list of objects on stdout")


def _run(a: argparse.Namespace) -> int:
    import json

    from lejepa_scale.operations import runs

    def text() -> str:
        found = runs.standings(runs.runs_in(a.folders or [Path("runs")]))
        return json.dumps(runs.as_json(found), indent=1) if a.json else runs.as_table(found)

    return shown_again(text, a.every, once=not a.watch)


COMMAND = Command(
    "runs", "list runs: which train, how far they are, how good", _DESCRIPTION, _add_arguments, _run, only_prints=True
)
