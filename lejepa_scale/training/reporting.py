"""What a run reports: means kept on the device between log steps, one JSON object per logged step, a progress bar, W&B."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from lejepa_scale.addresses import Address
from lejepa_scale.checkpoint.files import write_text
from lejepa_scale.config import Config
from lejepa_scale.errors import UserError

logger = logging.getLogger(__name__)


class Means:
    """Running means of scalars that live on the device, over the steps that count: nobody waits."""

    def __init__(self) -> None:
        self._sums: dict[str, Float[Tensor, "2"]] = {}  # of the values, and of how many there are

    def add(self, counts: Bool[Tensor, ""], **values: Float[Tensor, ""]) -> None:
        """One of each, unless `counts` is false."""
        for name, value in values.items():
            value = value.detach().double()
            pair = torch.where(counts, torch.stack([value, torch.ones_like(value)]), 0.0)
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def take(self) -> dict[str, Float[Tensor, ""]]:
        """Those since they were last taken, on the device; NaN where nothing counted."""
        out = {name: pair[0] / pair[1] for name, pair in self._sums.items()}
        self._sums = {}
        return out


class Reporter:
    """Rank 0's voice: progress bar, metrics.jsonl and W&B. Silent on other ranks."""

    def __init__(self, config: Config, first_step: int, active: bool) -> None:
        self.active = active
        self._wandb: Any = None
        if not active:
            return
        self.path = config.run.dir / "metrics.jsonl"
        _drop_after(self.path, first_step)
        self._bar = tqdm(
            total=config.train.steps,
            initial=first_step,
            unit="step",
            desc=config.run.dir.name,
            mininterval=0.5 if sys.stderr.isatty() else 15.0,
            dynamic_ncols=True,
            smoothing=0.05,
        )
        if config.log.wandb.enabled:
            self._wandb = _start_wandb(config)

    def advance(self) -> None:
        if self.active:
            self._bar.update()

    def log(self, record: dict[str, float]) -> dict[str, float | None]:
        """The record as it is written: None for what is no number."""
        clean = {k: (v if math.isfinite(v) else None) for k, v in record.items()}
        if not self.active:
            return clean
        with self.path.open("a") as file:
            file.write(json.dumps(clean) + "\n")
        shown = {"loss": "loss", "images_per_second": "img/s", "probe_accuracy": "probe"}
        self._bar.set_postfix({label: f"{record[key]:.3g}" for key, label in shown.items() if key in record})
        if self._wandb is not None:
            self._wandb.log(clean, step=int(record["step"]))
        return clean

    def close(self) -> None:
        if self.active:
            self._bar.close()
            if self._wandb is not None:
                self._wandb.finish()


def steps_taken(run_dir: Path) -> int:
    """The last step that metrics.jsonl tells of; 0 where there is none."""
    return max((int(record["step"]) for _, record in _records(run_dir / "metrics.jsonl")), default=0)


def _records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines of metrics.jsonl that can be read, and what they say. A crash of the system may have left half a line, or
    zeros in place of one: these are told of."""
    if not path.exists():
        return []
    found, torn = [], 0
    for line in path.read_bytes().decode(errors="replace").split("\n"):
        try:
            record = json.loads(line)
            int(record["step"])
            found.append((line, record))
        except (ValueError, TypeError, KeyError):
            torn += bool(line)
    if torn:
        logger.warning("%d lines of %s cannot be read, and are left out: a crash may have torn them.", torn, path)
    return found


def _drop_after(path: Path, step: int) -> None:
    """Forget lines of steps that a resumed run will take again."""
    if path.exists():
        write_text(path, "".join(f"{line}\n" for line, record in _records(path) if record["step"] <= step))


def _start_wandb(config: Config) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError("log.wandb.enabled=true needs wandb: pip install 'lejepa_scale[wandb]'.") from error
    settings = config.log.wandb
    online = bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
    identity = config.run.dir / "wandb_id"
    if not identity.exists():
        identity.write_text(secrets.token_hex(4))
    with _command_line_without_secrets():
        return wandb.init(
            project=settings.project,
            name=settings.name or config.run.dir.name,
            id=identity.read_text(),
            resume="allow",
            mode="online" if online else "offline",
            dir=str(config.run.dir),
            config=config.model_dump(mode="json", by_alias=True),
        )


@contextmanager
def _command_line_without_secrets() -> Iterator[None]:
    """W&B keeps it with the run."""
    words = sys.argv
    sys.argv = [str(Address(word)) for word in words]
    try:
        yield
    finally:
        sys.argv = words
