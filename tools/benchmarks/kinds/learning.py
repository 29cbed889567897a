"""What is learned, in which time, and by which encoders."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks import encoders, reach, stability
from benchmarks.kinds.kind import Kinds
from benchmarks.measure import Results, run_sections
from benchmarks.race import contest
from lejepa_scale.errors import UserError

_RACE = f"""Contestants train for the same seconds on the same images and cores: {", ".join(contest.CONTESTANTS)}.
Their numbers of steps are their rates, measured in turns beforehand, times the seconds. With the same --json file a race
that was cut short goes on, other durations and labels join it, and the table is of all."""


def register(kinds: Kinds) -> None:
    """The kinds of this file."""
    kind = kinds.add(
        "race", run=_race, overrides=True, help="accuracy at equal time, against other methods", description=_RACE
    )
    kind.add_argument("--config", type=Path, help="the recipe of ours, whose encoder and image size all have")
    kind.add_argument("--train", help="labelled shards; labels are for scoring alone")
    kind.add_argument("--test", help="labelled shards")
    kind.add_argument("--minutes", type=float, default=10, help="of training, for each run; %(default)g")
    kind.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each; default: 0 1 2")
    kind.add_argument(
        "--contestants", nargs="+", default=list(contest.CONTESTANTS), metavar="NAME", help="default: all"
    )
    kind.add_argument(
        "--label", default=contest.OURS, help="what ours is called, where a file holds several; %(default)s"
    )
    kind.add_argument("--plot", type=Path, help="PNG, PDF or SVG: accuracy against seconds of training")
    kind = kinds.add(
        "stability",
        run=_stability,
        overrides=True,
        help="a recipe on other batches, encoders and seeds, untuned: does it train?",
    )
    kind.add_argument("--config", type=Path, help="the recipe, whose encoder, batch and seed are varied")
    kind.add_argument("--train", help="labelled shards; labels are for scoring alone")
    kind.add_argument("--test", help="labelled shards")
    kind.add_argument("--images", type=int, default=40_000, help="that each run sees; %(default)s")
    kind.add_argument("--encoders", nargs="+", choices=stability.ENCODERS, default=list(stability.ENCODERS))
    kind.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256], help="default: 64 128 256")
    kind.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    kind = kinds.add("isotropy", run=_isotropy, help="does SIGReg reach isotropy from far away?")
    kind.add_argument("--plot", type=Path, help="PNG, PDF or SVG of every direction's statistic over the steps")
    kind = kinds.add("encoders", run=_encoders, help="does a model of every timm module train and export?")
    kind.add_argument("--only", nargs="+", choices=encoders.MODELS, metavar="MODULE", default=[], help="of timm.models")
    kind.add_argument("--page", type=Path, help="write the table as Markdown")


def _race(arguments: argparse.Namespace) -> Results:
    """Its own rows into the JSON file, the table, and the picture."""
    a = arguments
    if not (a.config and a.train and a.test):
        raise UserError("bench.py race needs --config RECIPE, --train SHARDS and --test SHARDS.")
    minutes, seeds, timed = (0.01, (0,), 0.1) if a.smoke else (a.minutes, tuple(a.seeds), contest.Race.timed)
    threads = torch.get_num_threads()
    race = contest.Race(
        a.config, tuple(a.overrides), a.train, a.test, minutes, seeds, tuple(a.contestants), threads, a.label, timed
    )
    found = contest.run(race, a.json)
    print(contest.as_table(found))
    if a.plot:
        contest.picture(found, a.plot)
    a.json = None  # is written
    return Results(machine=found["machine"], rows=[])


def _stability(arguments: argparse.Namespace) -> Results:
    """Rows, and the table."""
    a = arguments
    if not (a.config and a.train and a.test):
        raise UserError("bench.py stability needs --config RECIPE, --train SHARDS and --test SHARDS.")
    study = stability.Study(
        a.config, tuple(a.overrides), a.train, a.test, a.images, encoders=tuple(a.encoders), batches=tuple(a.batches),
        seeds=tuple(a.seeds), threads=torch.get_num_threads(),
    )  # fmt: skip
    results = run_sections({"stability": stability.measure(study)}, torch.device("cpu"), minutes=1e6)
    print(stability.as_table(results["rows"]))
    return results


def _isotropy(arguments: argparse.Namespace) -> Results:
    sizes = {"steps": 300, "samples": 256, "width": 8} if arguments.smoke else {}
    sections = {"isotropy": reach.reach(arguments.plot, **sizes)}
    return run_sections(sections, torch.device("cpu"), minutes=60)


def _encoders(arguments: argparse.Namespace) -> Results:
    chosen = ["resnet"] if arguments.smoke else arguments.only
    results = run_sections({"encoders": encoders.sweep(chosen)}, torch.device("cpu"), minutes=300)
    if arguments.page:
        arguments.page.write_text(encoders.page(results["rows"]))
    return results
