"""Where a run goes on: the newest complete checkpoint, if its order of samples is still the configuration's. Refuses what
would repeat or leave out samples without a word, and keeps config.yaml current."""

from __future__ import annotations

import logging
import os
import time
from functools import partial
from pathlib import Path

from torch import Tensor

from lejepa_scale.checkpoint import Progress, Saved, Store
from lejepa_scale.checkpoint.files import write_text
from lejepa_scale.checkpoint.metrics import METRICS, steps_taken
from lejepa_scale.checkpoint.places import Place, place, within
from lejepa_scale.checkpoint.saved import damage
from lejepa_scale.checkpoint.store import BEST, LAST, find
from lejepa_scale.config import Config, dump, migrate, parsed, recorded
from lejepa_scale.config.keys import keys_of
from lejepa_scale.data.mixture import Mixture
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.report import FILES
from lejepa_scale.parallel import collectives, process_group

logger = logging.getLogger(__name__)
_OF_A_RUN = (
    "checkpoints",
    LAST,
    BEST,
    METRICS,
    "config.yaml",
    "keys",
    "quarantine.jsonl",
    "nonfinite.jsonl",
    "nonfinite",
    "hang",
    "ranks.json",
    "train.log",
    "evaluation.json",
    "evaluation.html",
    "picture.html",
    "tensorboard",
    *(f"results-{name}.csv" for name in FILES.values()),
    "wandb_id",
)


def resume(config: Config, store: Store, mixture: Mixture) -> tuple[Saved | None, dict[str, Tensor], Progress]:
    """The newest complete checkpoint that is undamaged, or the one that run.resume names; a fresh start where there is none.
    A damaged one is told of and renamed. Raises UserError, on every rank, where there is nothing sound to go on from,
    what there is cannot be gone on from, or cannot be read."""
    path, problems = collectives.on_rank_zero(lambda: _chosen(config, store), "looking for a checkpoint"), list[str]()
    while path is not None:
        mine = collectives.everywhere(
            partial(damage, path, process_group.rank(), process_group.world_size()), "taking the checkpoint's checksums"
        )
        found = [one for one in collectives.gather_objects(mine) if one is not None]
        if not found:
            break
        problems.append(" ".join(dict.fromkeys(found)))
        path = collectives.on_rank_zero(partial(_before, store, path, problems), "looking at a damaged checkpoint")
    if path is None:
        return None, {}, Progress(0, mixture.fingerprint)
    saved = collectives.everywhere(partial(Saved, path), "reading the checkpoint")

    def accepted() -> dict[str, Tensor]:
        logger.info("resuming from %s (step %d).", path, saved.progress.step)
        _refuse_another_order(config, mixture, saved)
        return saved.probe()

    return saved, collectives.on_rank_zero(accepted, "reading the checkpoint"), saved.progress


def _chosen(config: Config, store: Store) -> Place | None:
    """What to go on from, if it is sound."""
    latest, named = store.latest(), config.run.resume
    if named not in ("auto", "never"):
        if latest is None:
            return find(named)
        if within(store.root, place(named)):
            raise UserError(
                f"run.resume={named} lies in the run itself, which has gone on to {latest}: what came after would be "
                "lost. Give another run.dir, which goes on from there."
            )
        logger.info("run.resume is not used: the run has a checkpoint of its own.")
    if latest is None and (steps := steps_taken(config.run.dir)):
        had_one = (config.run.dir / LAST).exists() or steps >= 2 * config.checkpoint.every  # whose first save was over
        if had_one:
            raise UserError(
                f"{config.run.dir} has taken {steps} steps, and no complete checkpoint is there. Restore one, or "
                "begin again at step 0 with run.resume=never, which moves what is there aside, or with another run.dir."
            )
        logger.info("%s was ended in step %d, before its first checkpoint: starting at step 0.", config.run.dir, steps)
    return latest


def _before(store: Store, damaged: Place, problems: list[str]) -> Place | None:
    """The checkpoint before one that is damaged, which is renamed, so that it counts no more."""
    if damaged.parent.resolve() != store.root.resolve():
        raise UserError(problems[-1])
    if damage(damaged) is None:
        raise UserError(
            f"{problems[-1]} Rank 0 reads it without a fault: run.dir must lie on a file system that all nodes share, and "
            "its bytes must be the same on all of them."
        )
    aside = store.set_aside(damaged)
    if (path := store.latest()) is None:
        raise UserError(
            f"no checkpoint of {store.run_dir} is sound. {' '.join(problems)} What is damaged is in {aside}; "
            "begin again at step 0 with run.resume=never, or in another run.dir."
        )
    logger.warning("%s It is now %s; the run goes on from the one before, %s.", problems[-1], aside, path)
    return path


def begin_anew(config: Config, store: Store) -> None:
    """With run.resume=never: move what a run has left in its folder aside. A restart by a launcher goes on, all the same.
    Raises UserError where its checkpoints lie elsewhere."""
    if config.run.resume != "never" or int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0:
        return
    if config.checkpoint.dir is not None and (latest := store.latest()) is not None:
        raise UserError(f"run.resume=never, and {latest} is there: give another checkpoint.dir, or move what it holds.")
    found = [config.run.dir / name for name in _OF_A_RUN if (config.run.dir / name).exists()]
    if found:
        aside = config.run.dir / f"before_{time.strftime('%Y%m%d_%H%M%S')}"
        aside.mkdir()
        for path in found:
            path.rename(aside / path.name)
        logger.warning("run.resume=never: what %s held is now in %s.", config.run.dir, aside)


def write_config(config: Config) -> None:
    """Keep config.yaml current; changed keys of a resumed run are named. Called on rank 0 once a start is not refused."""
    config.run.dir.mkdir(parents=True, exist_ok=True)
    path, text = config.run.dir / "config.yaml", dump(config)
    if path.exists() and (before := path.read_bytes()) != text.encode():
        logger.info("%s", _changes(path, before, text))
    write_text(path, text)


def _changes(path: Path, before: bytes, now: str) -> str:
    try:
        old, new = (_flatten(migrate(parsed(text, str(path)))) for text in (before, now))
    except UserError as error:  # edited by hand, or cut short
        said = str(error).splitlines()[0].rstrip(".")
        return f"{said}; it is written anew, and a run goes by its checkpoints'."
    defaults = {key.path: key.default for key in keys_of(Config)}
    old = {key: defaults.get(key) for key in new.keys() - old.keys()} | old  # keys that there were not yet
    changed = [
        f"{k}: {old.get(k)} -> {new.get(k)}" for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)
    ]
    if not changed:
        return f"{path} is written anew, with the keys that are new in this version."
    return f"configuration changed since this run was started: {'; '.join(changed)}"


def _refuse_another_order(config: Config, mixture: Mixture, saved: Saved) -> None:
    """Step s takes the positions from s x global_batch on, of an order that the shards, the seed and the blocks determine:
    with another of these, samples would come twice or never."""
    checkpoint = saved.path
    if not saved.progress.data_fingerprint:  # of a state that another trainer made
        logger.info(
            "%s says nothing of the data before: step %d goes on with the samples at its place in the order of "
            "data.shards.",
            checkpoint,
            saved.progress.step,
        )
    elif saved.progress.data_fingerprint != mixture.fingerprint:
        raise UserError(
            f"the shards of data.shards are not those that {checkpoint} was trained on (names, sizes, counts or weights "
            "differ), so the order of samples cannot be continued. Restore them, or start a new run.dir."
        )
    path = checkpoint / "config.yaml"
    before, now = _order(recorded(saved.config_text(), origin=str(path))), _order(config)
    if changed := [key for key in now if now[key] != before[key]]:
        raise UserError(
            f"{checkpoint} was trained with {_named(before, changed)}, not {_named(now, changed)}: samples would be "
            f"repeated or left out. Keep {_named(before, changed)} (train.micro_batch may change), or start a new run.dir."
        )


def _order(config: Config) -> dict[str, int]:
    """The keys that the order of samples depends on, besides the shards and their weights."""
    return {
        "run.seed": config.run.seed,
        "data.shuffle_block": config.data.shuffle_block,
        "train.global_batch": config.train.global_batch,
    }


def _named(order: dict[str, int], keys: list[str]) -> str:
    return ", ".join(f"{key} = {order[key]}" for key in keys)


def _flatten(tree: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, sub in tree.items() for k, v in _flatten(sub, f"{prefix}.{key}" if prefix else key).items()}
