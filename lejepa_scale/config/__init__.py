"""The run's typed, strict configuration: YAML plus dotted overrides. Imports no torch, so that a wrong key is refused before
anything starts."""

from lejepa_scale.config.batches import BatchPlan, check_world, plan_batches
from lejepa_scale.config.durations import in_steps
from lejepa_scale.config.files import changed, dump, load_config, migrate, parsed, recorded, validate
from lejepa_scale.config.schema import Augment, Config, Data, Objective, Optim, Source, ViewGroup, Views

__all__ = [
    "Augment",
    "BatchPlan",
    "Config",
    "Data",
    "Objective",
    "Optim",
    "Source",
    "ViewGroup",
    "Views",
    "changed",
    "check_world",
    "dump",
    "in_steps",
    "load_config",
    "migrate",
    "parsed",
    "plan_batches",
    "recorded",
    "validate",
]
