"""Measure and check what is ours on this machine.

  python tools/bench.py gpu --json gpu.json      everything worth checking on a CUDA GPU, in one run of under 9 minutes
  python tools/bench.py sigreg                   SIGReg's time, memory, growth and traffic against the textbook form
  python tools/bench.py input                    images/s per core of the input pipeline against torchvision on Pillow
  python tools/bench.py isotropy --plot FILE     free embeddings under SIGReg's gradient: is every direction Gaussian?
  python tools/bench.py order                    the order of a simulated billion of samples: start, look-up, memory, mixing

--smoke runs the same code at toy sizes on whatever is here: it checks the benchmark itself. Results go to
docs/benchmarks.md with the date, the machine and the command.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from benchmarks import gpu, input, order, reach, sigreg
from benchmarks.measure import Results, run_sections

from lejepa_scale.errors import UserError

_PHOTOS = Path(__file__).parents[2] / "shared/data/imagenet_sample.tar"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--smoke", action="store_true", help="toy sizes on whatever device is here")
    options.add_argument("--json", type=Path, help="also write the results as JSON")
    kind = kinds.add_parser("gpu", parents=[options], help="attention, precision, a short training run, steps and MFU")
    kind.add_argument("--minutes", type=float, default=8.5, help="sections not begun by then are not measured")
    kind = kinds.add_parser("sigreg", parents=[options], help="SIGReg alone, on the GPU where there is one")
    kind.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    kind.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    kind = kinds.add_parser("input", parents=[options], help="decoding, crops and colours on one core, loader memory")
    kind.add_argument("--photos", type=Path, default=_PHOTOS, help="a plain tar of photographs; default: %(default)s")
    kind = kinds.add_parser("isotropy", parents=[options], help="does SIGReg reach isotropy from far away?")
    kind.add_argument("--plot", type=Path, help="PNG, PDF or SVG of every direction's statistic over the steps")
    kinds.add_parser("order", parents=[options], help="start, look-up and memory of a billion samples; on the CPU")
    arguments = parser.parse_args()
    try:
        measure = {"gpu": _gpu, "sigreg": _sigreg, "input": _input, "isotropy": _isotropy, "order": _order}
        results = measure[arguments.kind](arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    failed = [row for row in results["rows"] if row.get("ok") is False]
    for row in failed:
        print(f"FAILED: {row['section']}, {row['case']}", file=sys.stderr)
    return 1 if failed else 0


def _gpu(arguments: argparse.Namespace) -> Results:
    if arguments.smoke:
        return gpu.measure(gpu.TOY, torch.device("cuda" if torch.cuda.is_available() else "cpu"), arguments.minutes)
    if not torch.cuda.is_available():
        raise UserError(
            "bench.py gpu needs a CUDA device, and torch sees none here; nothing was measured. "
            "On a machine without one, --smoke runs the same code at toy sizes."
        )
    return gpu.measure(gpu.FULL, torch.device("cuda"), arguments.minutes)


def _sigreg(arguments: argparse.Namespace) -> Results:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    sizes = sigreg.CUDA if device.type == "cuda" else sigreg.CPU
    return sigreg.measure(sigreg.TOY if arguments.smoke else sizes, device)


def _input(arguments: argparse.Namespace) -> Results:
    return input.measure(input.TOY if arguments.smoke else input.FULL, arguments.photos)


def _isotropy(arguments: argparse.Namespace) -> Results:
    sizes = {"steps": 300, "samples": 256, "width": 8} if arguments.smoke else {}
    sections = {"isotropy": reach.reach(arguments.plot, **sizes)}
    return run_sections(sections, torch.device("cpu"), minutes=60)


def _order(arguments: argparse.Namespace) -> Results:
    samples, shards = (10**6, 1000) if arguments.smoke else (10**9, 100_000)
    sections = {"scale": order.scale(samples, shards), "mixing": order.mixing(100 if arguments.smoke else 1000)}
    return run_sections(sections, torch.device("cpu"), minutes=10)


if __name__ == "__main__":
    sys.exit(main())
