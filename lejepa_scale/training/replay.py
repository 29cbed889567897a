"""A step that came to no numbers, taken again: from the newest checkpoint before it, step by step as the run took them, and
that one under watch. Reads a run, and changes nothing in it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from lejepa_scale.checkpoint import Progress, Saved, Store
from lejepa_scale.checkpoint.places import Place, place
from lejepa_scale.checkpoint.store import step_of
from lejepa_scale.config import Config, changed, in_steps, recorded
from lejepa_scale.errors import UserError
from lejepa_scale.parallel import collectives, process_group
from lejepa_scale.progress import bar
from lejepa_scale.training.guard import finite_samples
from lejepa_scale.training.hunt import Found, Hunt
from lejepa_scale.training.loop import next_step
from lejepa_scale.training.run import Run
from lejepa_scale.training.start import check_everything, first_weights, open_together, start_engine, started


@dataclass(frozen=True)
class Replayed:
    """What came of the step. of_ranks: the first operation of each rank that was not finite, and its samples without finite
    features."""

    run_dir: Path
    step: int
    checkpoint: Place | None  # that the weights are from; None: the run's first
    finite: bool
    same_ranks: bool
    of_ranks: list[tuple[Found | None, list[str]]]
    seen: int  # samples of the step on all ranks


def replay(file: Path) -> Replayed:
    """Take the step again that `file` (RUN/nonfinite/step_XXXXXXXX.json) is about. Every rank calls, best of as many as the
    run had: draws depend on them. Raises UserError where the file, the run or a checkpoint before the step is gone."""
    record, config = _read(file)
    run_dir, step = file.parent.parent, int(record["step"])
    plan, shapes = check_everything(config)
    with process_group.joined(timedelta(minutes=config.engine.timeout_minutes)) as device:
        root = None if config.checkpoint.dir is None else place(config.checkpoint.dir)
        store = Store(run_dir, config.checkpoint.keep, root=root)
        path = collectives.on_rank_zero(partial(_before, store, step), "looking for a checkpoint")
        begin = first_weights(config, store, shapes) if path is None else None
        mixture = open_together(config)
        config = in_steps(config, mixture.num_samples)
        saved = None if path is None else collectives.everywhere(partial(Saved, path), "reading the checkpoint")
        progress = Progress(0, mixture.fingerprint) if saved is None else saved.progress
        if progress.data_fingerprint not in ("", mixture.fingerprint):
            raise UserError(f"the shards of data.shards are not those that {path} was trained on: restore them.")
        engine = start_engine(config, plan, device, saved, begin=begin, shapes=shapes)
        del saved, begin
        with started(config, plan, mixture, engine, None, progress) as run:
            _up_to(run, step - 1)
            hunt = Hunt()
            with hunt.watching(engine.module):
                result = next_step(run, hunt.phase, more=False)
            own = [
                name for name, good in zip(run.feed.samples, finite_samples(result).tolist(), strict=True) if not good
            ]
            found = collectives.gather_objects((hunt.found, own))
            finite = bool(result.finite)
    return Replayed(run_dir, step, path, finite, plan.ranks == record["ranks"], found, plan.global_batch)


def _up_to(run: Run, step: int) -> None:
    ahead = range(run.progress.step, step)
    for _ in bar("steps before", ahead, unit="step", shown=process_group.rank() == 0):
        next_step(run, lambda name: nullcontext())


def _read(file: Path) -> tuple[dict[str, Any], Config]:
    config_file = file.parent.parent / "config.yaml"
    try:
        record = json.loads(file.read_text())
        int(record["step"]), int(record["ranks"])
        text = config_file.read_bytes()
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is no record of a step: give RUN/nonfinite/step_XXXXXXXX.json, which a run writes for each step "
            "that came to no numbers."
        ) from error
    config = recorded(text, str(config_file))
    quiet = {"data.log_keys": False, "engine.compile": False}  # compiled blocks cannot be looked into
    return record, changed(config, {key: value for key, value in quiet.items() if _differs(config, key, value)})


def _differs(config: Config, key: str, value: object) -> bool:
    section, name = key.split(".")
    return bool(getattr(getattr(config, section), name) != value)


def _before(store: Store, step: int) -> Place | None:
    """The newest checkpoint from which the step can be reached."""
    complete = store.complete()
    usable = [path for path in complete if step_of(path) < step]
    if complete and not usable:
        raise UserError(
            f"no checkpoint of {store.run_dir} is from before step {step}; the oldest that is left is {complete[0]}. "
            "checkpoint.keep and checkpoint.keep_every say how many stay."
        )
    return usable[-1] if usable else None
