"""What a GPU does, and what can be said of one that is not here."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks import gpu, roofline, rounding, sigreg, step, waits
from benchmarks.kinds.kind import TOY, Kinds
from benchmarks.measure import Results
from benchmarks.record import tables
from lejepa_scale.errors import UserError


def register(kinds: Kinds) -> None:
    """The kinds of this file."""
    kind = kinds.add("gpu", run=_gpu, help="steps and MFU, parity, profile, memory, NCCL, short runs")
    kind.add_argument("--minutes", type=float, default=8.5, help="what is not measured by then is left; %(default)s")
    kind.add_argument("--only", nargs="+", choices=gpu.SECTIONS, metavar="SECTION", help=", ".join(gpu.SECTIONS))
    kind.add_argument("--again", action="store_true", help="begin the --json file anew, instead of going on with it")
    kind.add_argument("--markdown", type=Path, help="the tables of docs/benchmarks.md; default: printed at the end")
    kind = kinds.add("sigreg", run=_sigreg, help="SIGReg alone, on the GPU where there is one")
    kind.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    kind.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    for name, measure, said in (
        ("waits", waits.measure, "where the host waits for a GPU; operators launched by phase"),
        ("roofline", roofline.measure, "a step's time on a GPU, on paper"),
    ):
        kind = kinds.add(name, run=partial(_on_paper, measure), overrides=True, help=said)
        kind.add_argument("--config", type=Path, help="a recipe, such as configs/vitl_in1k.yaml")
        kind.add_argument("--images", type=int, default=8, help="images a step; %(default)s")
    kinds.add("rounding", run=_rounding, help="what TF32 changes of SIGReg, and float8 of a linear layer")


def _gpu(arguments: argparse.Namespace) -> Results:
    """Row by row into the JSON file, where it goes on from what is there; and the tables."""
    here = torch.cuda.is_available()
    if not arguments.smoke and not here:
        raise UserError(
            "bench.py gpu needs a CUDA device, and torch sees none here; nothing was measured. "
            "On a machine without one, --smoke runs the same code at toy sizes."
        )
    results = gpu.measure(
        gpu.TOY if arguments.smoke else gpu.FULL,
        torch.device("cuda" if here else "cpu"),
        arguments.minutes,
        arguments.only or (),
        path=arguments.json,
        again=arguments.again,
        command=shlex.join(["python", "tools/bench.py", *sys.argv[1:]]),
    )
    arguments.json = None  # written
    if arguments.markdown:
        arguments.markdown.write_text(tables(results))
    else:
        print(tables(results))
    return results


def _sigreg(arguments: argparse.Namespace) -> Results:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    sizes = sigreg.CUDA if device.type == "cuda" else sigreg.CPU
    return sigreg.measure(sigreg.TOY if arguments.smoke else sizes, device)


def _on_paper(measure: Callable[[step.Recipe], Results], arguments: argparse.Namespace) -> Results:
    """On tensors that say they are on a GPU."""
    config, overrides = arguments.config, list(arguments.overrides)
    if arguments.smoke:
        config = config or TOY
        overrides = ["model.options={depth: 2}", *overrides]
    if config is None:
        raise UserError(f"bench.py {arguments.kind} needs --config FILE, a recipe such as configs/vitl_in1k.yaml.")
    settled = ["engine.name=single", "engine.compile=false", "train.steps=5", "optim.warmup_steps=0", "log.every=1"]
    return measure(step.Recipe(config, (*settled, *overrides)).of(arguments.images, 1))


def _rounding(arguments: argparse.Namespace) -> Results:
    return rounding.measure(arguments.smoke)
