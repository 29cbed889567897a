"""A training step and a save, on one process or on ranks."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from benchmarks import saving, step
from benchmarks.features import FEATURES
from benchmarks.kinds.kind import TOY, Kinds
from benchmarks.measure import Results
from benchmarks.ports import free_port
from lejepa_scale.cli.command import refuse
from lejepa_scale.errors import UserError
from lejepa_scale.parallel import launch

_STEP = """The step is the trainer's own, on any recipe, engine and launcher:

  python tools/bench.py step --config configs/vits_cifar10.yaml                       the recipe's batch, one process
  python tools/bench.py step --config configs/vitl_in1k.yaml --images 64 engine.compile=true      64 images a rank
  python tools/bench.py step --config FILE --images 8 --ranks 2 engine.name=fsdp      starts two ranks itself
  torchrun --nproc-per-node 8 tools/bench.py step --config FILE                       or under a launcher

  ... --compare packed                 the configuration in turns with each other form of a feature: time, memory,
  ... --compare checkpointing,engine   collectives, and whether loss and gradient agree
  ... --mode loader                    images/s of the input pipeline alone
  ... --mode end-to-end                shards to updated weights, and the share of the time that waits for data
  ... --profile trace.json             phases of a step; a Chrome trace for chrome://tracing or ui.perfetto.dev

Features: """ + ", ".join(FEATURES)


def register(kinds: Kinds) -> None:
    """The kinds of this file."""
    kind = kinds.add(
        "step",
        run=_step,
        overrides=True,
        help="a training step: rate, MFU, memory, phases, collectives, and each feature's gain",
        description=_STEP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kind.add_argument("--config", type=Path, help="a recipe's name, or a YAML file; see configs/")
    kind.add_argument("--images", type=int, help="images a rank and step, in place of the recipe's batch")
    kind.add_argument("--mode", choices=step.MODES, default="synthetic", help="where views come from; %(default)s")
    kind.add_argument("--compare", action="extend", nargs="+", metavar="FEATURE", default=[], help="see above")
    kind.add_argument("--apart", action="store_true", help="compare one after the other, where two forms do not fit")
    kind.add_argument("--against", choices=["minimal"], help="a plain training loop on the same model and batch")
    kind.add_argument("--profile", type=Path, metavar="TRACE.json", help="phases from torch's profiler, and its trace")
    kind.add_argument("--ranks", type=int, default=1, help="start this many ranks on this machine")
    kind.add_argument("--steps", type=int, default=10, help="timed steps, of which medians are taken; %(default)s")
    kind = kinds.add(
        "checkpoint", run=_checkpoint, overrides=True, help="what saving costs a step; bytes, seconds, memory"
    )
    kind.add_argument("--config", type=Path, help="a recipe's name, or a YAML file; see configs/")
    kind.add_argument("--images", type=int, help="images a rank and step, in place of the recipe's batch")
    kind.add_argument("--ranks", type=int, default=1, help="start this many ranks on this machine")
    kind.add_argument("--every", type=int, default=20, help="steps between saves; %(default)s")
    kind.add_argument("--rounds", type=int, default=3, help="of --every steps, for each way of saving; %(default)s")
    kind.add_argument("--read", type=Path, metavar="CHECKPOINT", help="read that one instead, and time it")
    kind.add_argument("--plan", action="store_true", help="who writes what on 64 and 512 ranks, alone")
    kind.add_argument(
        "--write", type=Path, metavar="FOLDER", help="save random weights and moments there instead, and time it"
    )
    kind.add_argument("--out", type=Path, help="folder for the checkpoints; default: a temporary one")


def _step(arguments: argparse.Namespace) -> Results | int:
    """Here, under a launcher, or on ranks of its own."""
    ranks = launch.ranks() if launch.launched() else arguments.ranks
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    try:
        recipe, options = _step_request(arguments, ranks)
        step.check_request(recipe, options, ranks)
    except UserError as error:
        error.everywhere = True
        raise
    if ranks > 1 and not launch.launched():
        return _on_ranks(ranks)
    return _measured(arguments, lambda: step.measure(recipe, options))


def _checkpoint(arguments: argparse.Namespace) -> Results | int:
    """Here, under a launcher, or on ranks of its own."""
    ranks = launch.ranks() if launch.launched() else arguments.ranks
    if ranks > 1 and not launch.launched():
        return _on_ranks(ranks)
    overrides = tuple(arguments.overrides)
    if arguments.smoke:
        arguments.config = arguments.config or TOY
        overrides = ("model.options={depth: 2}", "objective.sigreg.num_slices=32", *overrides)
        arguments.images, arguments.every, arguments.rounds = arguments.images or 4, 2, 1

    def measure() -> Results:
        if arguments.config is None:
            raise UserError("bench.py checkpoint needs --config FILE, a recipe such as configs/vits_cifar10.yaml.")
        recipe = step.Recipe(arguments.config, overrides)
        recipe = recipe.of(arguments.images, ranks) if arguments.images else recipe
        a = arguments
        return saving.measure(recipe, a.every, a.rounds, a.read, a.write, a.out, plan=a.plan)

    return _measured(arguments, measure)


def _measured(arguments: argparse.Namespace, measure: Callable[[], Results]) -> Results:
    """On every rank, of which the first alone prints and writes. An error ends the process at once: other ranks may wait in
    a collective for this one."""
    if launch.rank():
        sys.stdout, arguments.json = open(os.devnull, "w"), None
    try:
        return measure()
    except UserError as error:
        os._exit(refuse(error))


def _step_request(arguments: argparse.Namespace, ranks: int) -> tuple[step.Recipe, step.Options]:
    words = [word for text in arguments.compare for word in ([text] if "=" in text else text.split(","))]
    overrides = [*arguments.overrides, *(word for word in words if "=" in word)]  # --compare packed train.steps=5
    images, steps = arguments.images, arguments.steps
    if arguments.smoke:
        arguments.config = arguments.config or TOY
        overrides = ["model.options={depth: 2}", "objective.sigreg.num_slices=32", *overrides]
        images, steps = images or 4, 2
    if arguments.config is None:
        raise UserError("bench.py step needs --config FILE, a recipe such as configs/vits_cifar10.yaml.")
    recipe = step.Recipe(arguments.config, tuple(overrides))
    options = step.Options(
        mode=arguments.mode,
        compare=tuple(dict.fromkeys(word for word in words if "=" not in word)),
        steps=steps,
        trace=arguments.profile,
        apart=arguments.apart,
        minimal=arguments.against == "minimal",
    )
    return recipe.of(images, ranks) if images else recipe, options


def _on_ranks(ranks: int) -> int:
    """The same command under torchrun, with the cores shared out."""
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(ranks),
        "--master-port",
        str(free_port()),
    ]
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    return subprocess.run([*command, *sys.argv], env=environment, check=False).returncode
