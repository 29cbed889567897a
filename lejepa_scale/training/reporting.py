"""What a run reports: means kept on the device between log steps, one JSON object per logged step, a progress bar, W&B."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lejepa_scale.checkpoint.files import write_text
from lejepa_scale.checkpoint.metrics import METRICS, read_lines
from lejepa_scale.config import Config
from lejepa_scale.errors import UserError
from lejepa_scale.progress import counter
from lejepa_scale.training import wandb_run

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
    """Rank 0's voice: progress bar, metrics.jsonl, W&B and TensorBoard. Silent on other ranks."""

    def __init__(self, config: Config, first_step: int, active: bool) -> None:
        self.active = active
        self._wandb: Any = None
        self._tensorboard: Any = None
        if not active:
            return
        self.path = config.run.dir / METRICS
        _drop_after(self.path, first_step)
        self._shown: dict[str, str] = {}
        steps = config.train.steps
        self._bar = counter(config.run.dir.name, unit="step", total=steps, done=first_step, kept=True)
        if config.log.wandb.enabled:
            self._wandb = wandb_run.start(config)
        if config.log.tensorboard.enabled:
            self._tensorboard = _start_tensorboard(config.run.dir, first_step)

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
        shown = {
            "loss": "loss",
            "images_per_second": "img/s",
            "probe_accuracy": "probe",
            "eval_knn": "k-NN",
            "eval_average_knn": "averaged",
        }
        self._shown |= {label: f"{record[key]:.3g}" for key, label in shown.items() if key in record}
        self._bar.set_postfix(self._shown)
        if self._wandb is not None:
            run = self._wandb
            self._kept_from_harm(lambda: run.log(clean, step=int(record["step"])))
        if self._tensorboard is not None:
            for name, value in clean.items():
                if value is not None and name != "step":
                    self._tensorboard.add_scalar(_titled(name), value, int(record["step"]))
        return clean

    def close(self) -> None:
        if self.active:
            self._bar.close()
            if self._wandb is not None:
                self._kept_from_harm(self._wandb.finish)
            if self._tensorboard is not None:
                self._tensorboard.close()

    def _kept_from_harm(self, work: Callable[[], object]) -> None:
        """A service that fails in the middle of a run is done without from then on."""
        try:
            work()
        except Exception as error:
            logger.warning("W&B failed (%s): the run goes on without it; its numbers are in metrics.jsonl.", error)
            self._wandb = None


def _drop_after(path: Path, step: int) -> None:
    """Forget lines of steps that a resumed run will take again."""
    if path.exists():
        write_text(path, "".join(f"{line}\n" for line, record in read_lines(path) if record["step"] <= step))


def _start_tensorboard(run_dir: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "log.tensorboard.enabled=true needs tensorboard: pip install 'lejepa_scale[tensorboard]'."
        ) from error
    purge = first_step + 1 if first_step else None  # what a resumed run will report again
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)


def _titled(name: str) -> str:
    """Grouped as TensorBoard groups by what stands before a slash."""
    return f"evaluation/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"training/{name}"
