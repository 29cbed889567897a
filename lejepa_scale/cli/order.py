"""lejepa order: which sample comes when."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lejepa_scale.cli.command import Command, positive

_DESCRIPTION = """  lejepa order --config vitg_lvd --world-size 4 --workers 3 --steps 0:10 > order.tsv

In the format of a run's key log. Nothing is trained or decoded.

  step  position  source  epoch  shard  member  name  [replacement]         (tab-separated; # opens a header)

The output must not depend on --world-size, --workers or train.micro_batch: compare with `cmp` or `lejepa audit`.
Steps count from 0: step s is what a run takes after checkpoint step_s, and metrics.jsonl reports as s + 1. `a:b` leaves b
out."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run, or a recipe's name")
    parser.add_argument(
        "--world-size", type=positive, default=1, metavar="W", help="ranks whose loaders are put together"
    )
    parser.add_argument("--workers", type=int, metavar="K", help="processes per rank; default: data.workers")
    parser.add_argument(
        "--steps", type=step_range, required=True, metavar="a:b", help="for instance 0:10: the first ten"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="as for lejepa train")


def step_range(text: str) -> range:
    """Steps on the command line: a:b."""
    first, colon, last = text.partition(":")
    try:
        steps = range(int(first or 0), int(last))
    except ValueError:
        steps = range(0)
    if not colon or not steps or steps.start < 0:
        raise argparse.ArgumentTypeError(f"{text!r} must read a:b with 0 <= a < b, for instance 0:10")
    return steps


def _run(arguments: argparse.Namespace) -> int:
    from lejepa_scale.config import load_config, plan_batches

    workers = [] if arguments.workers is None else [f"data.workers={arguments.workers}"]
    config = load_config(arguments.config, [*arguments.overrides, *workers])
    data, plan, seed, steps = config.data, plan_batches(config, arguments.world_size), config.run.seed, arguments.steps

    from lejepa_scale.data import open_mixture
    from lejepa_scale.data.audit.check import order_of_steps
    from lejepa_scale.data.audit.keylog import header_line, record_line

    mixture = open_mixture(data)
    header = mixture.key_log_header(data, seed=seed, global_batch=plan.global_batch, decoded=False)
    sys.stdout.write(header_line(header))
    for step, records in order_of_steps(mixture, data, plan, seed=seed, first=steps.start, last=steps.stop):
        sys.stdout.writelines(record_line(step, record) for record in records)
    return 0


COMMAND = Command("order", "print which samples each step takes", _DESCRIPTION, _add_arguments, _run, only_prints=True)
