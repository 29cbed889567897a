"""Where a run goes on: the newest complete checkpoint, if the data and the batch are still its own. Refuses what would
repeat or leave out samples without a word, and keeps config.yaml current."""

from __future__ import annotations

import logging

import yaml
from torch import Tensor

from lejepa_scale.checkpoint import CanonicalState, Progress, Store
from lejepa_scale.config import Config, dump, migrate
from lejepa_scale.data.mixture import Mixture
from lejepa_scale.errors import UserError
from lejepa_scale.parallel import collectives

logger = logging.getLogger(__name__)


def resume(config: Config, store: Store, mixture: Mixture) -> tuple[CanonicalState | None, dict[str, Tensor], Progress]:
    """The newest complete checkpoint, read by rank 0 (its tensors stay there); a fresh start where there is none.
    Raises UserError, on every rank, where it cannot be gone on from."""
    held: list[CanonicalState] = []

    def read() -> tuple[dict[str, Tensor], Progress]:
        config.run.dir.mkdir(parents=True, exist_ok=True)
        latest = store.latest()
        if latest is None:
            probe: dict[str, Tensor] = {}
            progress = Progress(0, mixture.fingerprint)
            if (config.run.dir / "metrics.jsonl").exists():
                logger.info("%s holds no complete checkpoint: starting at step 0.", config.run.dir)
        else:
            state, probe, progress = store.load(latest)
            held.append(state)
            logger.info("resuming from %s (step %d).", latest, progress.step)
        if progress.data_fingerprint != mixture.fingerprint:
            raise UserError(
                f"the shards of data.shards are not those that {latest} was trained on (names, sizes or counts differ), "
                "so the order of samples cannot be continued. Restore them, or start a new run.dir."
            )
        _refuse_another_batch(config, progress)
        _write_config(config)
        return probe, progress

    probe, progress = collectives.on_rank_zero(read)
    return (held[0] if held else None), probe, progress


def _refuse_another_batch(config: Config, progress: Progress) -> None:
    """Step s begins at sample s x global_batch: another batch would repeat or leave out samples without a word."""
    path = config.run.dir / "config.yaml"
    if not progress.step or not path.exists():
        return
    before = yaml.safe_load(path.read_text())["train"]["global_batch"]
    if before != config.train.global_batch:
        raise UserError(
            f"{config.run.dir} was trained to step {progress.step} with train.global_batch = {before}, not "
            f"{config.train.global_batch}: samples would be repeated or left out. Keep {before} (train.micro_batch may "
            "change), or start a new run.dir."
        )


def _write_config(config: Config) -> None:
    """Keep config.yaml current; changed keys of a resumed run are named."""
    path, text = config.run.dir / "config.yaml", dump(config)
    if path.exists() and (before := path.read_text()) != text:
        old, new = (_flatten(migrate(yaml.safe_load(t))) for t in (before, text))
        changed = [
            f"{k}: {old.get(k)} -> {new.get(k)}" for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)
        ]
        logger.info("configuration changed since this run was started: %s", "; ".join(changed))
    path.write_text(text)


def _flatten(tree: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, sub in tree.items() for k, v in _flatten(sub, f"{prefix}.{key}" if prefix else key).items()}
