"""lejepa train: pre-train an encoder, or go on with it."""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path

from lejepa_scale import logs
from lejepa_scale.cli.command import Command, refuse
from lejepa_scale.errors import Exit, UserError
from lejepa_scale.parallel import launch

_DESCRIPTION = """  lejepa train --config quickstart engine.name=single                          one process
  torchrun --nproc-per-node 8 -m lejepa_scale train --config vitl_in1k         any engine but `single`
  deepspeed --module lejepa_scale train --config vitg_lvd                      the same, by DeepSpeed's launcher
  torchrun --nproc-per-node 8 launchers/train.py --config configs/vitl_in1k.yaml         in a checkout

Further arguments override keys of the file: train.steps=100 data.shards='shards/train-{000..099}.tar'.
Starting the same command again goes on from the newest complete checkpoint in run.dir. SIGTERM, SIGINT (Ctrl-C), SIGHUP,
SIGUSR1 and SIGUSR2, `touch RUN_DIR/stop` and run.max_hours let it save first.

exit status: 0 finished, 75 stopped and saved (the same command goes on), 2 a wrong configuration, anything else a fault
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    from lejepa_scale.config.paths import recipe_table

    parser.epilog = "recipes:\n" + recipe_table()
    parser.add_argument("--config", type=Path, help="a recipe's name (below), or a YAML file")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="set by the deepspeed launcher; not needed")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a key of the configuration")


def _run(arguments: argparse.Namespace) -> int:
    from lejepa_scale.config import dump, load_config
    from lejepa_scale.config.paths import recipe_table

    try:
        if arguments.config is None:
            raise UserError(f"--config is missing: the name of a recipe, or a YAML file of yours.\n{recipe_table()}")
        config = load_config(arguments.config, arguments.overrides)
    except UserError as error:
        error.everywhere = True
        raise
    if arguments.print_config:
        print(dump(config), end="")
        return 0
    # libraries inside torch and DeepSpeed call each other's deprecated names
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    from lejepa_scale.cpu.allocator import keep_memory  # torch is imported once the configuration is known to be sound
    from lejepa_scale.training.loop import train

    keep_memory()
    logs.outlive_terminal()
    try:
        with logs.kept(config.run.dir):
            finished = train(config)
    except UserError as error:
        os._exit(refuse(error))  # other ranks may wait in a collective: leave without waiting for them
    if finished or launch.starts_again():  # else a run that was asked to stop would be started once more
        return Exit.DONE
    return Exit.STOPPED


COMMAND = Command("train", "pre-train an encoder, or go on with it", _DESCRIPTION, _add_arguments, _run)
