"""Pre-train an image encoder with LeJEPA.

  python     launchers/train.py --config configs/quickstart.yaml engine.name=single
  torchrun   --nproc-per-node 8 launchers/train.py --config configs/vitl_in1k.yaml
  deepspeed  launchers/train.py --config configs/vitg_lvd.yaml

Further arguments override keys of the file: train.steps=100 data.shards='shards/train-{000..099}.tar'.
Starting the same command again goes on from the newest complete checkpoint in run.dir.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

from lejepa_scale import logs
from lejepa_scale.config import dump, load_config
from lejepa_scale.errors import UserError
from lejepa_scale.parallel import launch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file; see configs/")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="set by the deepspeed launcher; not needed")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a key of the configuration")
    arguments = parser.parse_intermixed_args()
    try:
        config = load_config(arguments.config, arguments.overrides)
    except UserError as error:
        error.everywhere = True
        return fail(error)
    if arguments.print_config:
        print(dump(config), end="")
        return 0
    # libraries inside torch and DeepSpeed call each other's deprecated names
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    from lejepa_scale.cpu.allocator import keep_memory  # torch is imported once the configuration is known to be sound
    from lejepa_scale.training.loop import train

    keep_memory()
    logs.to_stderr()
    try:
        train(config)
    except UserError as error:
        fail(error)
        os._exit(2)  # other ranks may wait in a collective: leave without waiting for them
    return 0


def fail(error: UserError) -> int:
    """Print the paragraph once where every rank has the same error, else with the rank."""
    rank = launch.rank()
    if rank == 0 or not error.everywhere:
        print(f"error{f' on rank {rank}' if rank else ''}: {error}", file=sys.stderr)
    else:
        time.sleep(3)  # torchrun ends the other ranks when the first one leaves: rank 0 speaks before that
    sys.stdout.flush()
    sys.stderr.flush()
    return 2


if __name__ == "__main__":
    sys.exit(main())
