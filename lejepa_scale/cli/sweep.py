"""lejepa sweep: a small grid of runs over local processes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lejepa_scale.cli.command import Command, positive

_DESCRIPTION = """  lejepa sweep --config quickstart --out sweeps/a objective.lambda=0.01,0.02,0.05 optim.lr=4e-3,8e-3
  lejepa sweep --config vitl_in1k --out sweeps/b --jobs 4 --ranks 2 objective.lambda=0.02,0.05,0.1 run.seed=0,1

Values with commas between them make the grid, here of 3 x 2 runs; commas inside brackets, braces or quotes do not. Every
run is what `lejepa train` would make of its values, in --out/NAME, named by the keys that vary; what it says is in
--out/logs. The same command again goes on: finished runs are left as they are, others go on from their checkpoints, and
values may be added. Ctrl-C lets the runs save first. At the end the runs are ranked as `lejepa select` does."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    from lejepa_scale.config.paths import recipe_table

    parser.epilog = "recipes:\n" + recipe_table()
    parser.add_argument("--config", type=Path, required=True, help="a recipe's name (below), or a YAML file")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--jobs", type=positive, default=1, help="runs at a time; %(default)s")
    parser.add_argument("--ranks", type=positive, default=1, help="processes (GPUs) of each run; %(default)s")
    parser.add_argument(
        "--dry-run", action="store_true", help="check every configuration, name the runs, and start none"
    )
    parser.add_argument(
        "overrides", nargs="+", metavar="key.sub=value[,value...]", help="the grid, and what all runs share"
    )


def _run(a: argparse.Namespace) -> int:
    from lejepa_scale.config.durations import length_of
    from lejepa_scale.errors import Exit, UserError
    from lejepa_scale.operations import selection, selection_report, sweep

    points = sweep.grid(a.config, a.overrides, a.out, a.ranks)
    if a.dry_run:
        for point in sweep.with_steps(points, build=False):
            key, length = length_of(point.config)
            steps = (
                " (how many steps is known once the data is indexed)"
                if point.steps is None
                else f" = {point.steps:,} steps"
            )
            print(f"{point.dir}: {length}{steps if key != 'train.steps' else ''}")
        return 0
    found = sweep.sweep(a.config, a.overrides, a.out, jobs=a.jobs, ranks=a.ranks, points=points)
    if found.stopped:
        print(f"stopped: {len(found.finished)} of {len(points)} runs are finished. The same command goes on.")
        return Exit.STOPPED
    for name, words in found.failed.items():
        print(f"{name} failed: {words}", file=sys.stderr)
    if len(found.finished) > 1:
        try:
            ranked = selection.select([a.out / name for name in found.finished])
            print(f"{selection_report.as_table(ranked)}\n\n{selection_report.conclusion(ranked)}")
        except UserError as error:
            print(f"the runs are not ranked: {error}")
    return Exit.FAULT if found.failed else Exit.DONE


COMMAND = Command(
    "sweep", "run a small grid of configurations over local processes", _DESCRIPTION, _add_arguments, _run
)
