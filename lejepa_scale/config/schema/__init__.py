"""Every key of a run: names, types, defaults and what each is for. Refuses what one key alone can tell to be wrong; what
several keys together make wrong is in checks.py."""

from lejepa_scale.config.schema.data import Augment, Data, Source, ViewGroup, Views
from lejepa_scale.config.schema.model import InitFrom
from lejepa_scale.config.schema.objective import Objective
from lejepa_scale.config.schema.optim import Optim
from lejepa_scale.config.schema.run import EngineName
from lejepa_scale.config.schema.section import Positive, Section
from lejepa_scale.config.schema.whole import Config

__all__ = [
    "Augment",
    "Config",
    "Data",
    "EngineName",
    "InitFrom",
    "Objective",
    "Optim",
    "Positive",
    "Section",
    "Source",
    "ViewGroup",
    "Views",
]
