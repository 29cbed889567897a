"""lejepa replay: a step that came to no numbers, taken again under watch."""

from __future__ import annotations

import argparse
from pathlib import Path

from lejepa_scale.cli.command import Command
from lejepa_scale.errors import Exit

_DESCRIPTION = """\
  lejepa replay runs/a/nonfinite/step_00001234.json
  torchrun --nproc-per-node 8 -m lejepa_scale replay runs/a/nonfinite/step_00001234.json      as many ranks as the run had

A run writes such a file for each step whose gradient is not finite. The newest checkpoint before the step is read, the
steps up to it are taken as the run took them, and the step itself is watched, operation by operation: the first one whose
result is not finite is named, with its module, for every rank, and so are the samples without finite features. Nothing of
the run is changed. Compiled blocks run as they are written; draws of stochastic depth are those of the run with as many
ranks alone.

What may follow: train.skip_samples=[SHARD.tar/KEY], which leaves samples out, and `lejepa rollback RUN`, which goes back to
the checkpoint before the newest."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="RUN/nonfinite/step_XXXXXXXX.json")


def _run(a: argparse.Namespace) -> int:
    from lejepa_scale.parallel import launch
    from lejepa_scale.training.replay import Replayed, replay

    def said(found: Replayed) -> str:
        came = "finite this time" if found.finite else "not finite, as in the run"
        lines = [f"step {found.step}, from {found.checkpoint or 'the first weights'}: {came}."]
        if not found.same_ranks:
            lines.append("The run had another number of ranks: whatever is drawn was drawn otherwise.")
        names = []
        for rank, (first, samples) in enumerate(found.of_ranks):
            if first is not None:
                lines.append(f"rank {rank}: {first}.")
            if samples:
                lines.append(f"rank {rank}: features that are no numbers: {', '.join(samples)}.")
            names += samples
        if found.finite:
            return "\n".join(lines)
        if names and len(names) < found.seen:
            lines.append(f"To leave samples out: train.skip_samples=[{','.join(names)}]")
        lines.append(f"To go back to the checkpoint before the newest: lejepa rollback {found.run_dir}")
        return "\n".join(lines)

    found = replay(a.file)
    if launch.rank() == 0:
        print(said(found))
    return Exit.DONE


COMMAND = Command(
    "replay", "take a step that came to no numbers again, and find the cause", _DESCRIPTION, _add_arguments, _run
)
