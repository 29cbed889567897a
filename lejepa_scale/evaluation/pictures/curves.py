"""What a run has logged, as curves. Values that are no numbers are passed over."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from lejepa_scale.checkpoint.metrics import METRICS, read_metrics
from lejepa_scale.checkpoint.places import Place, place

_CHECKPOINTS = "checkpoints"  # of a run directory
# key, title, whether on a logarithmic scale if it is above 0 throughout
_SHOWN = (
    ("loss", "loss", True),
    ("loss_prediction", "prediction loss", True),
    ("loss_sigreg", "SIGReg loss", True),
    ("probe_accuracy", "accuracy of the online probe", False),
    ("effective_rank", "effective rank of the embeddings", False),
    ("grad_norm", "norm of the gradient", True),
)


@dataclass(frozen=True)
class Curve:
    """One quantity over the steps at which it was logged."""

    title: str
    steps: list[int]
    values: list[float]
    logarithmic: bool


def metrics_of(what: str | Place) -> Path | None:
    """The metrics.jsonl of a run on this machine's disks, named by its folder or by one of its checkpoints; None where there
    is none."""
    path = place(what) if isinstance(what, str) else what
    if not isinstance(path, Path):
        return None
    found = run_of(path) / METRICS
    return found if found.is_file() else None


def run_of(path: Path) -> Path:
    """The run's own folder, of this or of its checkpoints."""
    if path.name == _CHECKPOINTS:
        return path.parent
    return path.parent.parent if path.parent.name == _CHECKPOINTS else path


def curves(metrics: Path) -> list[Curve]:
    """Those of the quantities shown that have a value."""
    records = _numbers(metrics)
    found = []
    for key, title, logarithmic in _SHOWN:
        points = [(step, record[key]) for step, record in records.items() if key in record]
        if points:
            steps, values = [step for step, _ in points], [value for _, value in points]
            found.append(Curve(title, steps, values, logarithmic and min(values) > 0))
    return found


def _numbers(path: Path) -> dict[int, dict[str, float]]:
    """By step, in order; of a step that was logged twice the last ones."""
    records = ((int(record["step"]), record) for record in read_metrics(path))
    return {step: {key: float(value) for key, value in r.items() if _is_number(value)} for step, r in records}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
