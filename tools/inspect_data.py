"""Which sample comes when, and whether a run really consumed it so.

  python tools/inspect_data.py order --config configs/vitg.yaml --world-size 4 --workers 3 --steps 0:10 > order.tsv
  python tools/inspect_data.py audit runs/vitg               duplicates, omissions and gaps in a run's own log
  python tools/inspect_data.py audit order.tsv runs/vitg --steps 0:10            the first difference of two logs

A run keeps its log where data.log_keys=true. Steps count from 0: step s is what a run takes after checkpoint step_s, and
metrics.jsonl reports as s + 1. `a:b` leaves b out.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from lejepa_scale.config import load_config, plan_batches
from lejepa_scale.data import open_mixture
from lejepa_scale.data.audit.check import faults, first_difference, order_of_steps, read_log, summary
from lejepa_scale.data.audit.keylog import header_line, record_line
from lejepa_scale.errors import UserError

_ORDER = """Print the samples of each global step, in the format of a run's key log. Nothing is trained or decoded.

  step  position  source  epoch  shard  member  name  [replacement]         (tab-separated; # opens a header)

The output must not depend on --world-size, --workers or train.micro_batch: compare with `cmp` or `audit`."""

_AUDIT = """One log: every position of its steps must be there, no sample twice in an epoch, none missing from an epoch that
is over, and what a restarted run took again must agree. Two logs: the first position at which they differ.
Exit status: 0 all is well, 1 it is not, 2 a log cannot be read."""


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    order = commands.add_parser("order", help="print the samples of each step", description=_ORDER, formatter_class=raw)
    order.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    order.add_argument("--world-size", type=int, default=1, metavar="W", help="ranks whose loaders are put together")
    order.add_argument("--workers", type=int, metavar="K", help="processes per rank; default: data.workers")
    order.add_argument("--steps", type=_steps, required=True, metavar="a:b", help="for instance 0:10 for the first ten")
    order.add_argument("overrides", nargs="*", metavar="key.sub=value", help="as for launchers/train.py")
    audit = commands.add_parser("audit", help="check one log, or compare two", description=_AUDIT, formatter_class=raw)
    audit.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="run directory, or file that `order` printed")
    audit.add_argument("--steps", type=_steps, metavar="a:b", help="only this part of the logs")
    arguments = parser.parse_args()
    if arguments.command == "audit" and len(arguments.logs) > 2:
        parser.error("audit takes one log or two")
    try:
        return {"order": _order, "audit": _audit}[arguments.command](arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0


def _steps(text: str) -> range:
    first, colon, last = text.partition(":")
    try:
        steps = range(int(first or 0), int(last))
    except ValueError:
        steps = range(0)
    if not colon or not steps or steps.start < 0:
        raise argparse.ArgumentTypeError(f"{text!r} must read a:b with 0 <= a < b, for instance 0:10")
    return steps


def _order(arguments: argparse.Namespace) -> int:
    if arguments.world_size < 1:
        raise UserError(f"--world-size {arguments.world_size}: at least one rank is needed.")
    workers = [] if arguments.workers is None else [f"data.workers={arguments.workers}"]
    config = load_config(arguments.config, [*arguments.overrides, *workers])
    data, plan, seed, steps = config.data, plan_batches(config, arguments.world_size), config.run.seed, arguments.steps
    sources = open_mixture(data)
    header = sources.key_log_header(data, seed=seed, global_batch=plan.global_batch, decoded=False)
    sys.stdout.write(header_line(header))
    for step, records in order_of_steps(sources, data, plan, seed=seed, first=steps.start, last=steps.stop):
        sys.stdout.writelines(record_line(step, record) for record in records)
    sys.stdout.flush()
    return 0


def _audit(arguments: argparse.Namespace) -> int:
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


if __name__ == "__main__":
    sys.exit(main())
