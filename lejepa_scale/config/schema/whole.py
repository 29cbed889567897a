"""All sections of a run; what several keys together make wrong is in checks.py."""

from __future__ import annotations

from pydantic import ValidationInfo, model_validator

from lejepa_scale.config import checks
from lejepa_scale.config.schema.data import Data
from lejepa_scale.config.schema.evaluation import Evaluation, Probe
from lejepa_scale.config.schema.model import Model
from lejepa_scale.config.schema.objective import Objective
from lejepa_scale.config.schema.optim import Optim
from lejepa_scale.config.schema.run import Average, Checkpoint, Engine, Log, Run, Train
from lejepa_scale.config.schema.section import Section


class Config(Section):
    """One run."""

    run: Run
    train: Train
    data: Data
    model: Model
    engine: Engine = Engine()
    objective: Objective = Objective()
    optim: Optim = Optim()
    average: Average = Average()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    probe: Probe = Probe()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _parts_fit(self, info: ValidationInfo) -> Config:
        faults = checks.contradictions(self)
        if not (info.context or {}).get("recorded"):  # what a run has once accepted and written
            faults += checks.ignored_keys(self)
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def image_size(self) -> int:
        """Side in pixels at which the encoder is built and evaluated."""
        return self.model.image_size or self.data.views.global_.size
