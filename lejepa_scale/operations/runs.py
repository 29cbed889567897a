"""Which runs there are, and how each stands: from what its directory holds. Asks no process and no network."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lejepa_scale.checkpoint.metrics import METRICS, read_metrics
from lejepa_scale.checkpoint.places import ABSENT, reading
from lejepa_scale.checkpoint.saved import CONFIG, STATE
from lejepa_scale.config import Config, recorded
from lejepa_scale.config.durations import length_of
from lejepa_scale.errors import Exit, UserError
from lejepa_scale.training import lock
from lejepa_scale.training.loop import EXIT_STATUS

# The first that a run has is its score. Its encoder is the average of its weights, where it keeps one.
SCORES = ("eval_average_knn", "eval_knn", "eval_average_linear", "eval_linear", "probe_accuracy")
_DEEP = 3  # folders below one that is named


@dataclass(frozen=True)
class Standing:
    """How a run stands. state: running, silent (a lock whose holder gives no sign of life), finished, stopped (saved, the
    same command goes on), ended (a fault, or killed), or unreadable. steps: of the whole run, as it was asked for. age:
    seconds since its last record. score: the best of the metric of that name. where: the process that trains, or what could
    not be read."""

    run: str
    state: str
    step: int
    steps: str
    images_per_second: float | None
    age: float | None
    loss: float | None
    metric: str
    score: float | None
    where: str


def runs_in(folders: Iterable[Path]) -> list[Path]:
    """Run directories among `folders` and below them. Raises UserError where a folder holds none."""
    found: list[Path] = []
    for folder in folders:
        configs = [path for depth in range(_DEEP + 1) for path in folder.glob("*/" * depth + CONFIG)]
        here = sorted(path.parent for path in configs if not (path.parent / STATE).exists())  # else a checkpoint's
        if not here:
            raise UserError(f"{folder} holds no run: no {CONFIG} in it, or up to {_DEEP} folders below.")
        found += here
    return list(dict.fromkeys(found))


def standings(runs: Iterable[Path]) -> list[Standing]:
    """Of each; one that cannot be read hides none of the others."""
    return [_standing_or_not(run) for run in runs]


def _standing_or_not(run: Path) -> Standing:
    try:
        return standing(run)
    except UserError as error:
        return Standing(str(run), "unreadable", 0, "", None, None, None, "", None, str(error))


def standing(run: Path) -> Standing:
    """Raises UserError where a file of the run's is there and cannot be read."""
    records = read_metrics(run / METRICS)
    trained = [record for record in records if record.get("loss") is not None]
    last = trained[-1] if trained else {}
    metric = next((name for name in SCORES if any(record.get(name) is not None for record in records)), "")
    scores = [record[metric] for record in records if metric and record.get(metric) is not None]
    age = time.time() - (run / METRICS).stat().st_mtime if records else None
    state, where = _state(run)
    return Standing(
        str(run), state, int(records[-1]["step"]) if records else 0, _length(run), last.get("images_per_second"), age,
        last.get("loss"), metric, max(scores, default=None), where,
    )  # fmt: skip


def _state(run: Path) -> tuple[str, str]:
    if (held := lock.seen(run)) is not None:
        who, alive = held
        return "running" if alive else "silent", who
    try:
        with reading(run / EXIT_STATUS):
            left = (run / EXIT_STATUS).read_bytes().decode(errors="replace").strip()
    except ABSENT:
        left = ""
    return {str(Exit.DONE.value): "finished", str(Exit.STOPPED.value): "stopped"}.get(left, "ended"), ""


def config_of(run: Path) -> Config:
    """What a run was started with. Raises UserError where that cannot be read: cut short, or edited by hand."""
    path = run / CONFIG
    try:
        with reading(path):
            return recorded(path.read_bytes(), str(path))
    except ABSENT as error:
        raise UserError(f"{run} is no run: it has no {CONFIG}.") from error


def _length(run: Path) -> str:
    config = config_of(run)
    key, said = length_of(config)
    return str(config.train.steps) if key == "train.steps" else said


def as_table(found: Sequence[Standing]) -> str:
    """For a terminal."""
    head = ("run", "state", "step", "of", "img/s", "last record", "loss", "score")
    rows = [
        (
            one.run, one.state, str(one.step), one.steps, _number(one.images_per_second, ".0f"),
            "" if one.age is None else f"{spoken(one.age)} ago", _number(one.loss, ".4g"),
            f"{one.metric.removeprefix('eval_')} {one.score:.3f}" if one.score is not None else "",
        )
        for one in found
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    lines += [f"{one.run}: {one.where}" for one in found if one.state == "unreadable"]
    return "\n".join(line.rstrip() for line in lines)


def as_json(found: Sequence[Standing]) -> list[dict[str, Any]]:
    return [asdict(one) for one in found]


def _number(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)


def spoken(seconds: float) -> str:
    """A time in its largest unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
