"""Measure and check what is ours on this machine.

  python tools/bench.py gpu --json gpu.json      everything worth checking on a CUDA GPU, in one run of under 9 minutes; a
                                                 second one with the same file measures what the first did not reach
  python tools/bench.py step --config configs/vitl_in1k.yaml --images 64 --compare packed checkpointing
                                                 tokens/s, MFU, memory of a training step; what each feature is worth
  python tools/bench.py sigreg                   SIGReg's time, memory, growth and traffic against the textbook form
  python tools/bench.py input                    images/s per core of the input pipeline against torchvision on Pillow
  python tools/bench.py evaluation               images/s of the feature pass against a DataLoader; k-NN's time and memory
  python tools/bench.py race --config configs/vits_cifar10.yaml --train SHARDS --test SHARDS --minutes 10
                                                 accuracy at equal time: ours, the minimal recipe, SimCLR, VICReg, DINO
  python tools/bench.py stability --config configs/resnet10_cifar10.yaml --train SHARDS --test SHARDS
                                                 batches, encoders, seeds, untuned: collapse, jumps of the loss, accuracy
  python tools/bench.py isotropy --plot FILE     free embeddings under SIGReg's gradient: is every direction Gaussian?
  python tools/bench.py encoders --page FILE     two steps, a checkpoint and an export of a model of every timm module
  python tools/bench.py checkpoint --config configs/vits_cifar10.yaml --ranks 2 engine.name=fsdp
                                                 what saving costs a step, and of large models: bytes, seconds, memory
  python tools/bench.py convert                  every target for every family of encoders: exact, at which sizes, or refused
  python tools/bench.py waits --config configs/vitl_in1k.yaml --images 8
                                                 where the host waits for a GPU, kernels launched by phase: no GPU needed
  python tools/bench.py roofline --config configs/vitg_lvd.yaml --images 16
                                                 a step's time and MFU on paper, operator by operator: no GPU needed
  python tools/bench.py rounding                 what TF32 changes of SIGReg, and float8 of a linear layer: no GPU needed
  python tools/bench.py faults                   what becomes of a run under each signal and broken part, and of the next one
  python tools/bench.py monitoring               what looking after a run costs a step
  python tools/bench.py plan                     plans beside measured memory and published runs; a table to 4,096 GPUs
  python tools/bench.py hosts                    a run across two hosts (Linux namespaces), and what a cut link makes of it
  python tools/bench.py order                    the order of a simulated billion of samples: start, look-up, memory, mixing

--smoke runs the same code at toy sizes on whatever is here: it checks the benchmark itself. Results go to
docs/benchmarks.md with the date, the machine and the command.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.kinds import REGISTER
from benchmarks.kinds.kind import Kinds
from benchmarks.measure import Results

from lejepa_scale.cli.command import expect_writable, refuse
from lejepa_scale.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    kinds = Kinds(parser)
    for register in REGISTER:
        register(kinds)
    arguments, rest = parser.parse_known_args()  # overrides may stand anywhere among the options
    if unknown := [x for x in rest if not arguments.takes_overrides or x.startswith("-") or "=" not in x]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if arguments.takes_overrides:
        arguments.overrides += rest
    try:
        expect_writable(*(getattr(arguments, name, None) for name in ("json", "markdown", "page", "plot")))
        found = arguments.run(arguments)
    except UserError as error:
        return refuse(error)
    return found if isinstance(found, int) else _report(found, arguments.json)


def _report(results: Results, out: Path | None) -> int:
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1))
    failed = [row for row in results["rows"] if row.get("ok") is False]
    for row in failed:
        print(f"FAILED: {row['section']}, {row['case']}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
