"""The `lejepa` command: which commands there are, and a first session with them."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from lejepa_scale.cli import (
    audit,
    convert,
    doctor,
    embed,
    evaluate,
    index,
    make,
    order,
    picture,
    plan,
    replay,
    rollback,
    runs,
    select,
    statistics,
    sweep,
    train,
    watch,
)
from lejepa_scale.cli.command import Group, start
from lejepa_scale.cpu.spinning import spin_briefly
from lejepa_scale.operations.versions import versions

SHARDS = Group(
    "shards",
    "make: write tar shards for training; index: say beforehand what is in them; statistics: of their pixels",
    "Tar shards for training: write them, index them, and say what their pixels are.",
    (make.COMMAND, index.COMMAND, statistics.COMMAND),
)
LEJEPA = Group(
    "lejepa",
    "",
    "Pre-train image encoders with LeJEPA, from a laptop to a cluster.",
    (
        SHARDS,
        train.COMMAND,
        plan.COMMAND,
        doctor.COMMAND,
        watch.COMMAND,
        runs.COMMAND,
        replay.COMMAND,
        rollback.COMMAND,
        evaluate.COMMAND,
        embed.COMMAND,
        picture.COMMAND,
        sweep.COMMAND,
        select.COMMAND,
        convert.COMMAND,
        order.COMMAND,
        audit.COMMAND,
    ),
    """A first session, from shards to features; it takes some minutes on two cores:

  lejepa shards make synthetic --out data/scenes/train --count 8000 --size 48
  lejepa shards make synthetic --out data/scenes/test --count 2000 --size 48 --seed 1
  lejepa train --config quickstart engine.name=single train.steps=200
  lejepa evaluate runs/quickstart --train data/scenes/train --test data/scenes/test
  lejepa convert runs/quickstart encoder.safetensors --verify

  python -c 'import torch, lejepa_scale
  encoder, config = lejepa_scale.load_encoder("runs/quickstart")
  print(encoder([torch.randn(4, 3, 48, 48)])[0].shape)'

`lejepa train --help` has the recipes. On several GPUs a launcher starts the same command:

  torchrun --nproc-per-node 8 -m lejepa_scale train --config vitl_in1k data.shards=FOLDER
  deepspeed --module lejepa_scale train --config vitg_lvd data.shards=FOLDER""",
    (("--version", "versions in use, and which of torch were tried"),),
)


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; `words` are the command line's by default. Returns the exit status."""
    words = list(sys.argv[1:] if words is None else words)
    if words and re.fullmatch(r"--local[_-]rank=\d+", words[0]):
        del words[0]  # `deepspeed --module` puts it before the command
    if words and words[0] == "--version":
        print(versions())
        return 0
    spin_briefly()
    return start(LEJEPA, words)
