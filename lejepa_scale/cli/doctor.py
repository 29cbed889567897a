"""lejepa doctor: can this machine, and can all of them together, train?"""

from __future__ import annotations

import argparse
from pathlib import Path

from lejepa_scale.cli.command import Command
from lejepa_scale.errors import Exit

_DESCRIPTION = """\
  lejepa doctor                                                     this host
  lejepa doctor --config vitl_in1k data.shards=FOLDER               and what a run needs of it
  torchrun --nnodes 2 --nproc-per-node 8 ... -m lejepa_scale doctor --config vitl_in1k        all hosts, with one another

Versions, GPUs, cores, limits, shared memory, compiler, environment, stale locks; with a configuration its run directory,
room and rate for checkpoints, shards and batch; under a launcher whether ranks meet, agree in versions and files, see the
same directory, have the same time, and sum right. Start it as you would start the run. exit status: 0, or 2 if something is
wrong that the run would stumble over; warnings are no reason not to start."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="a recipe's name, or a YAML file")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="set by the deepspeed launcher; not needed")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a key of the configuration")


def _run(a: argparse.Namespace) -> int:
    from datetime import timedelta

    from lejepa_scale.config import load_config
    from lejepa_scale.operations import doctor, doctor_ranks
    from lejepa_scale.parallel import collectives, launch, process_group

    config = load_config(a.config, a.overrides) if a.config is not None else None
    findings = list(doctor.of_this_host(config))
    for one in findings if launch.rank() == 0 else []:
        print(one, flush=True)
    if launch.launched():
        minutes = 2.0 if config is None else config.engine.timeout_minutes
        with process_group.joined(timedelta(minutes=minutes)):
            for one in doctor_ranks.of_all_ranks(config):
                findings.append(one)
                if launch.rank() == 0:
                    print(one, flush=True)
            told = collectives.gather_objects((launch.rank(), [one for one in findings if one.level != "ok"]))
            if launch.rank() == 0:
                first = {str(one) for one in told[0][1]}
                for rank, others in told[1:]:
                    for one in (one for one in others if str(one) not in first):
                        print(f"rank {rank}:\n{one}")
            findings = [one for _, others in told for one in others]
    return Exit.MISTAKE if any(one.level == "wrong" for one in findings) else Exit.DONE


COMMAND = Command(
    "doctor", "whether this machine, and all of them together, can train", _DESCRIPTION, _add_arguments, _run
)
