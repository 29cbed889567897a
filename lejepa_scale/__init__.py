"""lejepa_scale: pre-train image foundation encoders with LeJEPA, from a laptop to a cluster. The public names are imported
when they are first used, so that `import lejepa_scale` starts no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lejepa_scale.checkpoint import load_encoder
    from lejepa_scale.config import load_config
    from lejepa_scale.data import Loader, open_mixture
    from lejepa_scale.errors import UserError
    from lejepa_scale.evaluation import evaluate
    from lejepa_scale.model import Encoder
    from lejepa_scale.objective import LeJEPALoss, SIGReg, VISReg, WeakSIGReg
    from lejepa_scale.training.loop import train

__version__ = "0.1.0"

_ROOMS = {
    "Encoder": "model",
    "LeJEPALoss": "objective",
    "Loader": "data",
    "SIGReg": "objective",
    "UserError": "errors",
    "VISReg": "objective",
    "WeakSIGReg": "objective",
    "evaluate": "evaluation",
    "load_config": "config",
    "load_encoder": "checkpoint",
    "open_mixture": "data",
    "train": "training.loop",
}
__all__ = [
    "Encoder",
    "LeJEPALoss",
    "Loader",
    "SIGReg",
    "UserError",
    "VISReg",
    "WeakSIGReg",
    "__version__",
    "evaluate",
    "load_config",
    "load_encoder",
    "open_mixture",
    "train",
]


if not TYPE_CHECKING:  # where it would make every name right

    def __getattr__(name: str) -> Any:
        if name not in _ROOMS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
