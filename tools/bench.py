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
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from benchmarks import (
    conversion,
    encoders,
    evaluation,
    faults,
    gpu,
    hosts,
    input,
    monitoring,
    order,
    plans,
    reach,
    roofline,
    rounding,
    saving,
    sigreg,
    stability,
    step,
    waits,
)
from benchmarks.features import FEATURES
from benchmarks.measure import Results, run_sections
from benchmarks.ports import free_port
from benchmarks.race import contest
from benchmarks.record import tables

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
_RACE = f"""Contestants train for the same seconds on the same images and cores: {", ".join(contest.CONTESTANTS)}.
Their numbers of steps are their rates, measured in turns beforehand, times the seconds. With the same --json file a race
that was cut short goes on, other durations and labels join it, and the table is of all."""
_RECIPES = ("step", "checkpoint", "waits", "roofline", "race", "stability")  # kinds that take overrides
_TEST_DATA = Path(os.environ.get("LEJEPA_TEST_DATA") or Path(__file__).parents[2] / "shared/data")
_PHOTOS = _TEST_DATA / "imagenet_sample.tar"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    kinds = parser.add_subparsers(dest="kind", required=True)
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--smoke", action="store_true", help="toy sizes on whatever device is here")
    options.add_argument("--json", type=Path, help="also write the results as JSON")
    kind = kinds.add_parser("gpu", parents=[options], help="steps and MFU, parity, profile, memory, NCCL, short runs")
    kind.add_argument("--minutes", type=float, default=8.5, help="what is not measured by then is left; %(default)s")
    kind.add_argument("--only", nargs="+", choices=gpu.SECTIONS, metavar="SECTION", help=", ".join(gpu.SECTIONS))
    kind.add_argument("--again", action="store_true", help="begin the --json file anew, instead of going on with it")
    kind.add_argument("--markdown", type=Path, help="the tables of docs/benchmarks.md; default: printed at the end")
    kind = kinds.add_parser(
        "step",
        parents=[options],
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
    kind.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a key of the configuration")
    kind = kinds.add_parser("sigreg", parents=[options], help="SIGReg alone, on the GPU where there is one")
    kind.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    kind.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    for name, text in (
        ("input", "decoding, crops and colours on one core, loader memory"),
        ("evaluation", "images/s of the feature pass against a DataLoader, time and memory of k-NN"),
    ):
        kind = kinds.add_parser(name, parents=[options], help=text)
        kind.add_argument(
            "--photos",
            type=Path,
            default=_PHOTOS,
            help="a plain tar of photographs; default: %(default)s (LEJEPA_TEST_DATA)",
        )
    kind = kinds.add_parser(
        "race", parents=[options], help="accuracy at equal time, against other methods", description=_RACE
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
    kind.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a key of the configuration")
    kind = kinds.add_parser(
        "stability", parents=[options], help="a recipe on other batches, encoders and seeds, untuned: does it train?"
    )
    kind.add_argument("--config", type=Path, help="the recipe, whose encoder, batch and seed are varied")
    kind.add_argument("--train", help="labelled shards; labels are for scoring alone")
    kind.add_argument("--test", help="labelled shards")
    kind.add_argument("--images", type=int, default=40_000, help="that each run sees; %(default)s")
    kind.add_argument("--encoders", nargs="+", choices=stability.ENCODERS, default=list(stability.ENCODERS))
    kind.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256], help="default: 64 128 256")
    kind.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    kind.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a key of the configuration")
    kind = kinds.add_parser("isotropy", parents=[options], help="does SIGReg reach isotropy from far away?")
    kind.add_argument("--plot", type=Path, help="PNG, PDF or SVG of every direction's statistic over the steps")
    kind = kinds.add_parser("encoders", parents=[options], help="does a model of every timm module train and export?")
    kind.add_argument("--only", nargs="+", choices=encoders.MODELS, metavar="MODULE", default=[], help="of timm.models")
    kind.add_argument("--page", type=Path, help="write the table as Markdown")
    kind = kinds.add_parser("checkpoint", parents=[options], help="what saving costs a step; bytes, seconds, memory")
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
    kind.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a key of the configuration")
    kind = kinds.add_parser(
        "convert", parents=[options], help="which encoder can become what, how exactly, at what cost"
    )
    kind.add_argument(
        "--source", type=Path, help="what `lejepa convert` costs of this checkpoint, in place of the table"
    )
    kind.add_argument(
        "--to", nargs="+", default=["timm", "hf", "safetensors"], help="targets, as 'safetensors --dtype bf16'"
    )
    for name, said in (
        ("waits", "where the host waits for a GPU; operators launched by phase"),
        ("roofline", "a step's time on a GPU, on paper"),
    ):
        kind = kinds.add_parser(name, parents=[options], help=said)
        kind.add_argument("--config", type=Path, help="a recipe, such as configs/vitl_in1k.yaml")
        kind.add_argument("--images", type=int, default=8, help="images a step; %(default)s")
        kind.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a key of the configuration")
    kind = kinds.add_parser("faults", parents=[options], help="what becomes of a run that is killed, stopped, cut off")
    kind.add_argument("--launchers", nargs="+", choices=faults.LAUNCHERS, default=list(faults.LAUNCHERS))
    kind.add_argument("--only", nargs="+", metavar="PART", default=[], help="faults in whose names one of these occurs")
    kind.add_argument("--ranks", type=int, default=2, help="under a launcher that starts several; %(default)s")
    kind = kinds.add_parser(
        "hosts", parents=[options], help="a run across two hosts, whose link or one of which goes; as root"
    )
    kind.add_argument("--only", nargs="+", metavar="PART", default=[], help="cases in whose names one of these occurs")
    kinds.add_parser(
        "plan",
        parents=[options],
        help="plans beside measured memory, published runs, and a table of the largest recipes",
    )
    kind = kinds.add_parser("monitoring", parents=[options], help="what looking after a run costs a step")
    kind.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    kinds.add_parser("rounding", parents=[options], help="what TF32 changes of SIGReg, and float8 of a linear layer")
    kinds.add_parser("order", parents=[options], help="start, look-up and memory of a billion samples; on the CPU")
    arguments, overrides = parser.parse_known_args()  # overrides may stand anywhere among the options
    unknown = [x for x in overrides if arguments.kind not in _RECIPES or x.startswith("-") or "=" not in x]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if arguments.kind == "step":
        arguments.overrides += overrides
        return _step(arguments)
    if arguments.kind == "checkpoint":
        arguments.overrides += overrides
        return _checkpoint(arguments)
    if arguments.kind in ("waits", "roofline", "race", "stability"):
        arguments.overrides += overrides
    try:
        measure: dict[str, Callable[[argparse.Namespace], Results]] = {
            "gpu": _gpu,
            "sigreg": _sigreg,
            "input": _input,
            "evaluation": _evaluation,
            "race": _race,
            "stability": _stability,
            "faults": _faults,
            "hosts": _hosts,
            "plan": _plan,
            "monitoring": lambda a: run_sections(
                {"monitoring": monitoring.costs(a.config)}, torch.device("cpu"), minutes=1e6
            ),
            "isotropy": _isotropy,
            "order": _order,
            "encoders": _encoders,
            "convert": _convert,
            "waits": partial(_on_paper, waits.measure),
            "roofline": partial(_on_paper, roofline.measure),
            "rounding": lambda arguments: rounding.measure(arguments.smoke),
        }
        results = measure[arguments.kind](arguments)
    except UserError as error:
        return refuse(error)
    return _report(results, arguments.json)


def _report(results: Results, out: Path | None) -> int:
    if out:
        out.write_text(json.dumps(results, indent=1))
    failed = [row for row in results["rows"] if row.get("ok") is False]
    for row in failed:
        print(f"FAILED: {row['section']}, {row['case']}", file=sys.stderr)
    return 1 if failed else 0


def _step(arguments: argparse.Namespace) -> int:
    """Here, under a launcher, or on ranks of its own."""
    rank = launch.rank()
    ranks = launch.ranks() if launch.launched() else arguments.ranks
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    try:
        recipe, options = _step_request(arguments, ranks)
        step.check_request(recipe, options, ranks)
    except UserError as error:
        error.everywhere = True
        return refuse(error)
    if ranks > 1 and not launch.launched():
        return _on_ranks(ranks)
    if rank:
        sys.stdout = open(os.devnull, "w")
    try:
        results = step.measure(recipe, options)
    except UserError as error:
        os._exit(refuse(error))  # other ranks may wait in a collective: leave without waiting for them
    return _report(results, arguments.json if rank == 0 else None)


def _checkpoint(arguments: argparse.Namespace) -> int:
    """Here, under a launcher, or on ranks of its own."""
    rank = launch.rank()
    ranks = launch.ranks() if launch.launched() else arguments.ranks
    if ranks > 1 and not launch.launched():
        return _on_ranks(ranks)
    if rank:
        sys.stdout = open(os.devnull, "w")
    overrides = tuple(arguments.overrides)
    if arguments.smoke:
        arguments.config = arguments.config or Path(__file__).parents[1] / "configs/vits_cifar10.yaml"
        overrides = ("model.options={depth: 2}", "objective.sigreg.num_slices=32", *overrides)
        arguments.images, arguments.every, arguments.rounds = arguments.images or 4, 2, 1
    try:
        if arguments.config is None:
            raise UserError("bench.py checkpoint needs --config FILE, a recipe such as configs/vits_cifar10.yaml.")
        recipe = step.Recipe(arguments.config, overrides)
        recipe = recipe.of(arguments.images, ranks) if arguments.images else recipe
        a = arguments
        results = saving.measure(recipe, a.every, a.rounds, a.read, a.write, a.out, plan=a.plan)
    except UserError as error:
        os._exit(refuse(error))
    return _report(results, arguments.json if rank == 0 else None)


def _step_request(arguments: argparse.Namespace, ranks: int) -> tuple[step.Recipe, step.Options]:
    words = [word for text in arguments.compare for word in ([text] if "=" in text else text.split(","))]
    overrides = [*arguments.overrides, *(word for word in words if "=" in word)]  # --compare packed train.steps=5
    images, steps = arguments.images, arguments.steps
    if arguments.smoke:
        arguments.config = arguments.config or Path(__file__).parents[1] / "configs/vits_cifar10.yaml"
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


def _convert(arguments: argparse.Namespace) -> Results:
    if arguments.source is not None:
        sections = {"costs": conversion.costs(arguments.source, arguments.to)}
    else:
        sections = {"table": conversion.table(2 if arguments.smoke else None)}
    return run_sections(sections, torch.device("cpu"), minutes=1e6)


def _on_paper(measure: Callable[[step.Recipe], Results], arguments: argparse.Namespace) -> Results:
    """On tensors that say they are on a GPU."""
    config, overrides = arguments.config, list(arguments.overrides)
    if arguments.smoke:
        config = config or Path(__file__).parents[1] / "configs/vits_cifar10.yaml"
        overrides = ["model.options={depth: 2}", *overrides]
    if config is None:
        raise UserError(f"bench.py {arguments.kind} needs --config FILE, a recipe such as configs/vitl_in1k.yaml.")
    settled = ["engine.name=single", "engine.compile=false", "train.steps=5", "optim.warmup_steps=0", "log.every=1"]
    return measure(step.Recipe(config, (*settled, *overrides)).of(arguments.images, 1))


def _encoders(arguments: argparse.Namespace) -> Results:
    chosen = ["resnet"] if arguments.smoke else arguments.only
    results = run_sections({"encoders": encoders.sweep(chosen)}, torch.device("cpu"), minutes=300)
    if arguments.page:
        arguments.page.write_text(encoders.page(results["rows"]))
    return results


def _sigreg(arguments: argparse.Namespace) -> Results:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    sizes = sigreg.CUDA if device.type == "cuda" else sigreg.CPU
    return sigreg.measure(sigreg.TOY if arguments.smoke else sizes, device)


def _evaluation(arguments: argparse.Namespace) -> Results:
    sizes = evaluation.TOY if arguments.smoke else evaluation.FULL
    return evaluation.measure(sizes, arguments.photos)


def _input(arguments: argparse.Namespace) -> Results:
    return input.measure(input.TOY if arguments.smoke else input.FULL, arguments.photos)


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
