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
from pathlib import Path

from lejepa_scale.config import dump, load
from lejepa_scale.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file; see configs/")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="set by the deepspeed launcher; not needed")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a key of the configuration")
    arguments = parser.parse_intermixed_args()
    rank = int(os.environ.get("RANK", "0"))
    try:
        config = load(arguments.config, arguments.overrides)
        if arguments.print_config:
            print(dump(config), end="")
            return 0
        from lejepa_scale.train import train  # torch is imported once the configuration is known to be sound

        train(config)
    except UserError as error:
        if rank == 0 or not (error.everywhere or "torch" not in sys.modules):
            print(f"error{f' on rank {rank}' if rank else ''}: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(2)  # other ranks may wait in a collective: leave without waiting for them
    return 0


if __name__ == "__main__":
    sys.exit(main())
