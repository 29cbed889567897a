"""Steps that came to no numbers: counted, their causes looked for among the samples of all ranks, and an end to too many."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor

from lejepa_scale.checkpoint.files import write_text
from lejepa_scale.errors import UserError
from lejepa_scale.parallel import collectives, process_group
from lejepa_scale.training.late import Late
from lejepa_scale.training.run import Run
from lejepa_scale.training.step import StepResult

logger = logging.getLogger(__name__)

FILE = "nonfinite.jsonl"  # in run.dir
FOLDER = "nonfinite"  # likewise: a file for each such step, which `lejepa replay` takes again
_SHOWN = 8  # samples in a message


class Guard:
    """Count steps whose gradient is not finite, name the samples that could be why, and stop the run after too many in a
    row. The engine has left everything as it was. What came of a step is read after the next one, when it is there. Raises
    UserError, on every rank."""

    def __init__(self) -> None:
        self.in_a_row = 0
        self._unread: tuple[Late, int, list[str]] | None = None

    def __call__(self, run: Run, result: StepResult) -> None:
        self._read(run)
        late = Late({"finite": result.finite, "samples": finite_samples(result)})
        self._unread = late, run.progress.step, list(run.feed.samples)
        if run.settles:
            self._read(run)

    def _read(self, run: Run) -> None:
        if self._unread is None:
            return
        (late, step, samples), self._unread = self._unread, None
        read = late.read()
        if read["finite"]:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        run.progress.nonfinite += 1
        own = [name for name, finite in zip(samples, read["samples"].tolist(), strict=True) if not finite]
        self._tell(run, step, collectives.gather_objects((own, len(samples))))
        limit = run.config.train.max_nonfinite
        if self.in_a_row >= limit:
            error = UserError(
                f"{limit} non-finite steps in a row up to step {step} (train.max_nonfinite = {limit}). "
                f"Lower optim.lr = {run.config.optim.lr:g} or set optim.clip_norm; the last checkpoint is untouched."
            )
            error.everywhere = True
            raise error

    def _tell(self, run: Run, step: int, found: list[tuple[list[str], int]]) -> None:
        if process_group.rank() == 0:
            logger.info("step %d: the gradient is not finite; skipped on every rank. %s", step, causes(found))
            write(run.config.run.dir / FILE, step, found)
            file = write_replay(run, step, found)
            if self.in_a_row == 1:
                logger.info("To look for the cause: lejepa replay %s", file)


def finite_samples(result: StepResult) -> Bool[Tensor, " b"]:
    """Of every sample of this rank's micro-batches, whether its features are numbers. Encoders that normalize over the batch
    pass on what one sample brings to all."""
    return torch.cat([out["features"].isfinite().all(dim=1) for out in result.outputs])


def causes(found: list[tuple[list[str], int]]) -> str:
    """A sentence on each rank's samples without finite features, out of how many it had."""
    total, bad = sum(count for _, count in found), sum(len(names) for names, _ in found)
    if not bad:
        return (
            "The features of every sample are finite: it is the loss or its gradient that is not, as with a learning rate "
            "that is too high."
        )
    if bad == total:
        return (
            f"No sample of {total:,} has finite features: the weights are not, or the encoder normalizes over a batch in "
            "which one was not."
        )
    named = [f"{name} (rank {rank})" for rank, (names, _) in enumerate(found) for name in names]
    return (
        f"{bad:,} of {total:,} samples have features that are not: {', '.join(named[:_SHOWN])}"
        + (f" and {bad - _SHOWN:,} more ({FILE})" if bad > _SHOWN else "")
        + "."
    )


def write_replay(run: Run, step: int, found: list[tuple[list[str], int]]) -> Path:
    """What it takes to take the step again: the step, the ranks, what everything random follows from, and the samples that
    could be the cause. The weights are those of a checkpoint before it, and of the steps since."""
    path = run.config.run.dir / FOLDER / f"step_{step:08d}.json"
    path.parent.mkdir(exist_ok=True)
    plan = run.plan
    record = {
        "step": step,
        "seed": run.config.run.seed,
        "ranks": plan.ranks,
        "micro_batch": plan.micro_batch,
        "accumulation": plan.accumulation,
        "of_ranks": {rank: names for rank, (names, _) in enumerate(found) if names},
    }
    write_text(path, json.dumps(record, indent=1) + "\n")
    return path


def write(path: Path, step: int, found: list[tuple[list[str], int]]) -> None:
    """A line for each such step."""
    ranks = {rank: names for rank, (names, _) in enumerate(found) if names}
    with path.open("a") as file:
        file.write(json.dumps({"step": step, "samples": sum(count for _, count in found), "of_ranks": ranks}) + "\n")
