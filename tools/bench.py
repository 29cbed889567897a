"""Measure and check what is ours on this machine.

  python tools/bench.py gpu --json gpu.json      everything worth checking on a CUDA GPU, in one run of under 9 minutes
  python tools/bench.py gpu --smoke              the same code at toy sizes, on a CPU too: checks the benchmark itself

Results go to docs/benchmarks.md with the date, the chip and the command.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from benchmarks import gpu

from lejepa_scale.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    kind = kinds.add_parser("gpu", help="attention, precision, a short training run, step throughput and MFU")
    kind.add_argument("--smoke", action="store_true", help="toy sizes on whatever device is here")
    kind.add_argument("--minutes", type=float, default=8.5, help="sections not begun by then are not measured")
    kind.add_argument("--json", type=Path, help="also write the results as JSON")
    arguments = parser.parse_args()
    try:
        results = _gpu(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    failed = [row for row in results["rows"] if row.get("ok") is False]
    for row in failed:
        print(f"FAILED: {row['section']}, {row['case']}", file=sys.stderr)
    return 1 if failed else 0


def _gpu(arguments: argparse.Namespace) -> gpu.Results:
    if arguments.smoke:
        return gpu.measure(gpu.TOY, torch.device("cuda" if torch.cuda.is_available() else "cpu"), arguments.minutes)
    if not torch.cuda.is_available():
        raise UserError(
            "bench.py gpu needs a CUDA device, and torch sees none here; nothing was measured. "
            "On a machine without one, --smoke runs the same code at toy sizes."
        )
    return gpu.measure(gpu.FULL, torch.device("cuda"), arguments.minutes)


if __name__ == "__main__":
    sys.exit(main())
