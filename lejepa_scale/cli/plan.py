"""lejepa plan: what a configuration needs and takes on GPUs that need not be there."""

from __future__ import annotations

import argparse
from pathlib import Path

from lejepa_scale.cli.command import Command, positive
from lejepa_scale.errors import Exit, UserError

_DESCRIPTION = """\
  lejepa plan --config vitg_lvd --gpus 64                      on 64 H100: does it fit, how long does it take?
  lejepa plan --config vitg_lvd --gpus 64 --chip a100          on others
  lejepa plan --config vitg_lvd --nodes 2 train.micro_batch=24 on hosts of 8, with other keys
  lejepa plan --config vitg_lvd --table                        on 8 to 4096 GPUs, a row each
  lejepa plan --config vitg_lvd --gpus 64 --trace              hold the formulas against a step of the real model

Memory of a rank by part; what ranks send; how long a step is expected to take, between which ends, and what that rests on;
hours; images/s and cores that the loader needs; checkpoints; and what to change where it does not fit. Reads no data and
needs no GPU: counts come from the model itself, on tensors without memory; seconds are a forecast."""
_GPUS = tuple(2**n for n in range(3, 13))


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    from lejepa_scale.config.paths import recipe_table

    parser.epilog = "recipes:\n" + recipe_table()
    parser.add_argument("--config", type=Path, help="a recipe's name (below), or a YAML file")
    parser.add_argument("--gpus", type=positive, metavar="N", help="ranks in all; hosts have 8")
    parser.add_argument("--nodes", type=positive, metavar="N", help="the same in hosts of 8 GPUs")
    parser.add_argument("--chip", default="h100", help="a100, h100, h200, b200 or mi300x (%(default)s)")
    parser.add_argument(
        "--table", action="store_true", help=f"a row for each of {_GPUS[0]} to {_GPUS[-1]:,} GPUs, or for --gpus alone"
    )
    parser.add_argument(
        "--trace", action="store_true", help="take a step of the real model on tensors without memory, and compare"
    )
    parser.add_argument("--samples", type=positive, metavar="N", help="images of the data set, for durations in epochs")
    parser.add_argument(
        "--images-per-core", type=float, metavar="N", help="that the loader reads in a second (262, measured)"
    )
    parser.add_argument("--write-rate", type=float, metavar="GB/S", help="of a host, for checkpoints (1)")
    parser.add_argument("--json", action="store_true", help="an object on stdout, in bytes and seconds")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a key of the configuration")


def _run(a: argparse.Namespace) -> int:
    import json

    from lejepa_scale.config import load_config
    from lejepa_scale.config.paths import recipe_table
    from lejepa_scale.cost.machines import GPUS_OF_A_HOST, machine

    if a.config is None:
        raise UserError(f"--config is missing: the name of a recipe, or a YAML file of yours.\n{recipe_table()}")
    config, chip = load_config(a.config, a.overrides), machine(a.chip)
    if a.gpus and a.nodes:
        raise UserError("--gpus and --nodes say the same: give one of them.")
    gpus = a.gpus or GPUS_OF_A_HOST * (a.nodes or 0)
    if not gpus and not a.table:
        raise UserError("--gpus N (or --nodes N, of 8 GPUs each) is missing: on how many? --table shows many at once.")
    for name, given in (("--images-per-core", a.images_per_core), ("--write-rate", a.write_rate)):
        if given is not None and not given > 0:
            raise UserError(f"{name} {given:g} must be more than 0.")

    from lejepa_scale.model import check
    from lejepa_scale.operations import plan_report, planning
    from lejepa_scale.operations.tracing import trace

    assumed = planning.Assumptions(
        chip,
        a.images_per_core or planning.IMAGES_PER_CORE,
        1e9 * a.write_rate if a.write_rate else planning.BYTES_PER_SECOND,
    )
    check(config)
    if a.table:
        rows = planning.table(config, assumed, [gpus] if gpus else _GPUS, a.samples)
        print(json.dumps(rows, indent=1) if a.json else plan_report.as_table(rows))
        return Exit.DONE
    plan = planning.plan_of(config, gpus, assumed, a.samples)
    suggestions = planning.advice(config, gpus, assumed)
    traced = trace(config, plan.batches) if a.trace else []
    if a.json:
        print(
            json.dumps(
                plan_report.as_json(config, plan, suggestions) | ({"trace": traced} if a.trace else {}), indent=1
            )
        )
        return Exit.DONE
    print(plan_report.report(str(a.config), config, plan, assumed, suggestions))
    if a.trace:
        print(f"\n{plan_report.as_table(traced)}")
    return Exit.DONE


COMMAND = Command(
    "plan",
    "memory, traffic, time and cost on N GPUs, before there are any",
    _DESCRIPTION,
    _add_arguments,
    _run,
    only_prints=True,
)
