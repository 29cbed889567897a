"""lejepa rollback: go back to an earlier checkpoint of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from lejepa_scale.cli.command import Command
from lejepa_scale.errors import Exit

_DESCRIPTION = """\
  lejepa rollback runs/a                  to the checkpoint before the newest
  lejepa rollback runs/a --to 4000        to that of step 4000, or the last one before it

Later checkpoints are moved to RUN/rolled_back_DATE, and nothing is deleted; the command that started the run goes on from
the one that is left, and metrics.jsonl forgets the steps that are taken again. Refuses a run that trains."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--to", type=int, metavar="STEP", help="at the latest")


def _run(a: argparse.Namespace) -> int:
    from lejepa_scale.operations.rollback import roll_back

    checkpoint, aside = roll_back(a.run, a.to)
    print(f"{a.run} goes on from {checkpoint}; later checkpoints are in {aside}.")
    return Exit.DONE


COMMAND = Command("rollback", "go back to an earlier checkpoint of a run", _DESCRIPTION, _add_arguments, _run)
