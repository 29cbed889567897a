"""What becomes of runs, and what is planned for them."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks import faults, hosts, monitoring, plans
from benchmarks.kinds.kind import Kinds
from benchmarks.measure import Results, run_sections


def register(kinds: Kinds) -> None:
    """The kinds of this file."""
    kind = kinds.add("faults", run=_faults, help="what becomes of a run that is killed, stopped, cut off")
    kind.add_argument("--launchers", nargs="+", choices=faults.LAUNCHERS, default=list(faults.LAUNCHERS))
    kind.add_argument("--only", nargs="+", metavar="PART", default=[], help="faults in whose names one of these occurs")
    kind.add_argument("--ranks", type=int, default=2, help="under a launcher that starts several; %(default)s")
    kind = kinds.add("hosts", run=_hosts, help="a run across two hosts, whose link or one of which goes; as root")
    kind.add_argument("--only", nargs="+", metavar="PART", default=[], help="cases in whose names one of these occurs")
    kinds.add(
        "plan",
        run=_plan,
        help="plans beside measured memory, published runs, and a table of the largest recipes",
    )
    kind = kinds.add("monitoring", run=_monitoring, help="what looking after a run costs a step")
    kind.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))


def _faults(arguments: argparse.Namespace) -> Results:
    """Rows, and the table."""
    launchers, only = (["python"], ["SIGUSR1"]) if arguments.smoke else (arguments.launchers, arguments.only)
    rows = faults.inject(launchers, only, arguments.ranks)
    results = run_sections({"faults": rows}, torch.device("cpu"), minutes=1e6)
    print(faults.as_table(results["rows"]))
    return results


def _hosts(arguments: argparse.Namespace) -> Results:
    """Rows, and the table."""
    only = ["finishes torchrun"] if arguments.smoke else arguments.only
    results = run_sections({"hosts": hosts.measure(only)}, torch.device("cpu"), minutes=1e6)
    print(faults.as_table(results["rows"]))
    return results


def _plan(arguments: argparse.Namespace) -> Results:
    models, ranks = (["quickstart"], [1]) if arguments.smoke else (list(plans.MODELS), plans.RANKS)
    sections = {
        "memory": plans.memory(models, ranks),
        "published runs": plans.published(),
        "scaling": plans.scaling(["vitg_lvd", "vitgigantic_lvd"], ["h100"]),
    }
    return run_sections(sections, torch.device("cpu"), minutes=1e6)


def _monitoring(arguments: argparse.Namespace) -> Results:
    return run_sections({"monitoring": monitoring.costs(arguments.config)}, torch.device("cpu"), minutes=1e6)
