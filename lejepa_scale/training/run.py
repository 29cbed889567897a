"""What a run holds and where it stands: what the loop hands to every action."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lejepa_scale.checkpoint import Progress
from lejepa_scale.config import BatchPlan, Config
from lejepa_scale.engine import Engine
from lejepa_scale.training.feed import Feed
from lejepa_scale.training.probe import OnlineProbe
from lejepa_scale.training.schedule import lambda_at
from lejepa_scale.training.step import StepResult


@dataclass
class Run:
    """Actions read it; each changes only what it says it does. `progress` is what survives in a checkpoint."""

    config: Config
    plan: BatchPlan
    device: torch.device
    engine: Engine
    feed: Feed
    progress: Progress
    probe: OnlineProbe | None = None
    lr: float = 0.0  # of the step just taken
    stopping: str = ""  # why it was asked to, on every rank
    started: float = field(default_factory=time.monotonic)
    beside: float = 0.0  # seconds since the last record in which no training was under way; who reports takes them out

    @property
    def lambda_(self) -> float:
        """Of the step just taken."""
        return lambda_at(max(0, self.progress.step - 1), self.config.train.steps, self.config.objective)

    @property
    def last(self) -> bool:
        """Whether the step just taken was the last of the run."""
        return self.progress.step == self.config.train.steps

    @property
    def settles(self) -> bool:
        """Whether what is read late must be read now: before a checkpoint, and at the end."""
        return self.last or bool(self.stopping) or self.progress.step % self.config.checkpoint.every == 0


Action = Callable[[Run, StepResult], None]  # after every step, on every rank
