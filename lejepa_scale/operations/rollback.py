"""Back to a checkpoint before: what came after it is moved aside, and the same command goes on from there."""

from __future__ import annotations

import time
from pathlib import Path

from lejepa_scale.checkpoint import Store
from lejepa_scale.checkpoint.files import write_text
from lejepa_scale.checkpoint.places import place
from lejepa_scale.checkpoint.store import LAST, step_of
from lejepa_scale.errors import UserError
from lejepa_scale.operations.runs import config_of
from lejepa_scale.training import lock


def roll_back(run: Path, step: int | None = None) -> tuple[Path, Path]:
    """Let the run go on from its newest checkpoint of `step` or before; unset: from the one before the newest. Gives that
    checkpoint and the folder that the later ones are in now. Raises UserError where there is none, or the run trains."""
    if (held := lock.seen(run)) is not None and held[1]:
        raise UserError(f"{run} trains ({held[0]}): stop it first, with `touch {run / 'stop'}`.")
    complete = _checkpoints(run)
    if not complete:
        raise UserError(f"{run} has no complete checkpoint.")
    steps = [step_of(path) for path in complete]
    stay = complete[:-1] if step is None else [path for path in complete if step_of(path) <= step]
    if not stay:
        wanted = "before the newest" if step is None else f"of step {step} or before"
        raise UserError(f"{run} has no checkpoint {wanted}; it has those of {', '.join(map(str, steps))}.")
    later = complete[len(stay) :]
    if not later:
        raise UserError(f"{stay[-1]} is the newest checkpoint: the run goes on from there in any case.")
    aside = run / f"rolled_back_{time.strftime('%Y%m%d_%H%M%S')}"
    aside.mkdir()
    for path in later:
        path.rename(aside / path.name)
    write_text(run / LAST, f"{stay[-1].name}\n")
    return stay[-1], aside


def _checkpoints(run: Path) -> list[Path]:
    """Complete ones, oldest first, wherever the run keeps them."""
    kept = config_of(run).checkpoint.dir
    root = None if kept is None else place(kept)
    if root is not None and not isinstance(root, Path):
        raise UserError(
            f"the checkpoints of {run} lie in {kept}, where nothing can be moved aside: go on in another run.dir, with "
            "run.resume=CHECKPOINT."
        )
    return [path for path in Store(run, keep=1, root=root).complete() if isinstance(path, Path)]
