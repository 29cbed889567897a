"""Where a run goes on: the newest complete checkpoint, if its order of samples is still the configuration's. Refuses what
would repeat or leave out samples without a word, and keeps config.yaml current."""

from __future__ import annotations

import logging
from pathlib import Path

import yaml
from torch import Tensor

from lejepa_scale.checkpoint import CanonicalState, Progress, Store
from lejepa_scale.config import Config, dump, migrate, recorded
from lejepa_scale.data.mixture import Mixture
from lejepa_scale.errors import UserError
from lejepa_scale.parallel import collectives

logger = logging.getLogger(__name__)


def resume(config: Config, store: Store, mixture: Mixture) -> tuple[CanonicalState | None, dict[str, Tensor], Progress]:
    """The newest complete checkpoint, read by rank 0 (its tensors stay there); a fresh start where there is none. The run
    directory is left as it is. Raises UserError, on every rank, where it cannot be gone on from."""
    held: list[CanonicalState] = []

    def read() -> tuple[dict[str, Tensor], Progress]:
        latest = store.latest()
        if latest is None:
            if (config.run.dir / "metrics.jsonl").exists():
                logger.info("%s holds no complete checkpoint: starting at step 0.", config.run.dir)
            return {}, Progress(0, mixture.fingerprint)
        state, probe, progress = store.load(latest)
        held.append(state)
        logger.info("resuming from %s (step %d).", latest, progress.step)
        _refuse_another_order(config, mixture, latest, progress)
        return probe, progress

    probe, progress = collectives.on_rank_zero(read)
    return (held[0] if held else None), probe, progress


def write_config(config: Config) -> None:
    """Keep config.yaml current; changed keys of a resumed run are named. Called on rank 0 once a start is not refused."""
    config.run.dir.mkdir(parents=True, exist_ok=True)
    path, text = config.run.dir / "config.yaml", dump(config)
    if path.exists() and (before := path.read_text()) != text:
        logger.info("%s", _changes(path, before, text))
    path.write_text(text)


def _changes(path: Path, before: str, now: str) -> str:
    try:
        old, new = (_flatten(migrate(yaml.safe_load(text))) for text in (before, now))
    except (yaml.YAMLError, UserError, AttributeError, TypeError) as error:  # edited by hand, or cut short
        return (
            f"{path} cannot be read and is written anew ({str(error).splitlines()[0]}); a run goes by its checkpoints'."
        )
    changed = [
        f"{k}: {old.get(k)} -> {new.get(k)}" for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)
    ]
    return f"configuration changed since this run was started: {'; '.join(changed)}"


def _refuse_another_order(config: Config, mixture: Mixture, checkpoint: Path, progress: Progress) -> None:
    """Step s takes the positions from s x global_batch on, of an order that the shards, the seed and the blocks determine:
    with another of these, samples would come twice or never. `checkpoint` has been verified, its config.yaml too."""
    if progress.data_fingerprint != mixture.fingerprint:
        raise UserError(
            f"the shards of data.shards are not those that {checkpoint} was trained on (names, sizes, counts or weights "
            "differ), so the order of samples cannot be continued. Restore them, or start a new run.dir."
        )
    path = checkpoint / "config.yaml"
    before, now = _order(recorded(yaml.safe_load(path.read_text()), origin=str(path))), _order(config)
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
