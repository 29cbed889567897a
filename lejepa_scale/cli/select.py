"""lejepa select: which of several runs to keep, without labels."""

from __future__ import annotations

import argparse
from pathlib import Path

from lejepa_scale.cli.command import Command, expect_writable

_DESCRIPTION = """  lejepa select sweeps/a                                  the runs of a folder, as of `lejepa sweep`
  lejepa select runs/a runs/b --json order.json
  lejepa select sweeps/a --against logistic --plot scatter.png

Ranks runs by their final loss / lambda^alpha, which needs no labels; LeJEPA's paper finds it to order runs nearly as a
linear probe does. Runs whose losses do not mean the same (other images, views, colours, objective, embedding width or
batch) are refused. `place` and `best` say how sure the order is. --against compares it with what `lejepa evaluate RUN` has
written into each run."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, or folders with some below")
    parser.add_argument("--alpha", type=float, default=0.4, help="%(default)s, as in the paper; 0: the loss itself")
    parser.add_argument(
        "--window",
        type=float,
        default=0.1,
        help="share of a run's steps, at its end, whose mean loss counts; %(default)s",
    )
    parser.add_argument("--unfinished", action="store_true", help="rank also runs that have steps to go")
    parser.add_argument(
        "--across", nargs="+", default=[], metavar="KEY",
        help="keys that may differ nevertheless, as data.views; data.shards and train.global_batch too",
    )  # fmt: skip
    parser.add_argument("--against", metavar="PROTOCOL", help="of each run's evaluation.json, as logistic or knn")
    parser.add_argument("--plot", type=Path, help="--against: scatter plot, a PNG, PDF or SVG file")
    parser.add_argument("--json", type=Path, help="the order, for programs")


def _run(a: argparse.Namespace) -> int:
    import json

    from lejepa_scale.errors import UserError
    from lejepa_scale.operations import agreement, selection, selection_report

    if a.plot is not None and a.against is None:
        raise UserError("--plot shows what --against compares: name a protocol, as --against logistic.")
    expect_writable(a.json, a.plot)
    found = selection.select(a.runs, alpha=a.alpha, window=a.window, across=a.across, unfinished=a.unfinished)
    out = selection_report.as_json(found)
    print(f"{selection_report.as_table(found)}\n\n{selection_report.conclusion(found)}")
    if a.against is not None:
        runs = agreement.runs_of(found)
        labels = [agreement.accuracy_of(run.path, a.against) for run in runs]
        compared = agreement.agreements(runs, labels, list(dict.fromkeys([0.0, a.alpha])))
        print("\n" + agreement.in_words(compared, a.against))
        out["against"] = agreement.as_json(compared, a.against)
        if a.plot is not None:
            agreement.plot(compared, a.plot, a.against)
            print(f"plot: {a.plot}")
    if a.json is not None:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps(out, indent=1))
        print(f"order: {a.json}")
    return 0


COMMAND = Command("select", "rank runs without labels", _DESCRIPTION, _add_arguments, _run, only_prints=True)
