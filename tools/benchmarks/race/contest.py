"""The race: contestants train for the same seconds on the same images and cores, several times, and one protocol scores
their frozen features. Goes on from the rows that a file holds already.

A contestant's number of steps is its rate on this machine, measured in turns beforehand, times the seconds: learning rates
need to know where they end, and what else the machine does then changes nothing.
"""

from __future__ import annotations

import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from benchmarks.measure import Row, describe
from benchmarks.race.methods import METHODS
from benchmarks.race.runs import Task, points
from lejepa_scale.config import load_config
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation import Options, evaluate

OURS = "ours"
CONTESTANTS = (OURS, *METHODS)
SCORES = ("knn", "logistic")
_ROUNDS = 2  # of measuring rates, in turns


@dataclass(frozen=True)
class Race:
    """What is raced. Several recipes of ours may stand in one file: `label` names this one."""

    recipe: Path
    overrides: tuple[str, ...]
    train: str
    test: str
    minutes: float
    seeds: tuple[int, ...]
    contestants: tuple[str, ...]
    threads: int
    label: str = OURS
    timed: float = 12.0  # seconds of steps whose rate is taken

    def task(self, name: str) -> Task:
        return Task(name, self.recipe, (*self.overrides, f"data.shards={self.train}"), self.threads)

    def called(self, name: str) -> str:
        """In tables."""
        return self.label if name == OURS else name


def run(race: Race, out: Path | None, tell: Callable[[str], None] = print) -> dict[str, Any]:
    """All rows: {"machine", "rates", "rows"}, as `out` holds them after each one.

    Raises UserError for a contestant that there is not, for a file of another race, and where a run fails."""
    if unknown := [name for name in race.contestants if name not in CONTESTANTS]:
        raise UserError(f"{unknown[0]} is none of the contestants: {', '.join(CONTESTANTS)}.")
    found = _read(out)
    _refuse_another(race, found, out)
    _measure_rates(race, found["rates"], tell)
    _write(found, out)
    for seed in race.seeds:  # all contestants of a seed before the next: a race that is cut short is still a race
        for name in race.contestants:
            if not any(_same(row, race, name, seed) for row in found["rows"]):
                row = _run(race, name, seed, found["rates"][race.called(name)])
                found["rows"].append(row)
                _write(found, out)
                tell(_line(row))
    return found


def _read(out: Path | None) -> dict[str, Any]:
    if out is not None and out.exists():
        return dict(json.loads(out.read_text()))
    return {"machine": describe(torch.device("cpu")), "rates": {}, "rows": []}


def _refuse_another(race: Race, found: dict[str, Any], out: Path | None) -> None:
    """What a file holds is of the same images, encoder and sizes for all, and of one recipe under each label."""
    config = load_config(race.recipe, list(race.overrides))
    model, views = config.model, config.data.views
    about = {
        "train": race.train, "test": race.test, "encoder": model.encoder, "options": model.options,
        "sizes": [group.size for group in (views.global_, views.local) if group.count], "threads": race.threads,
    }  # fmt: skip
    recipe = {"recipe": race.recipe.name, "overrides": list(race.overrides)}
    for kept, now, advice in (
        (found.setdefault("about", about), about, "give another --json file"),
        (found.setdefault("labels", {}).setdefault(race.label, recipe), recipe, "give it another --label"),
    ):
        if kept != now:
            other = ", ".join(f"{key} {kept[key]!r}, not {now[key]!r}" for key in now if kept.get(key) != now[key])
            raise UserError(f"{out} holds a race of {other}: {advice}.")


def _write(found: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.write_text(json.dumps(found, indent=1))


def _same(row: Row, race: Race, name: str, seed: int) -> bool:
    return (row["contestant"], row["minutes"], row["seed"]) == (race.called(name), race.minutes, seed)


def _measure_rates(race: Race, rates: dict[str, float], tell: Callable[[str], None]) -> None:
    """Steps/s of those that have none yet, in turns."""
    missing = [name for name in race.contestants if race.called(name) not in rates]
    tried: dict[str, list[float]] = {name: [] for name in missing}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(_ROUNDS):
            for name in missing:
                tried[name].append(race.task(name).rate(Path(folder, str(turn), name), race.timed))
    for name, each in tried.items():
        rates[race.called(name)] = median(each)
        tell(f"{race.called(name)}: {race.task(name).batch * median(each):.0f} images/s")


def _run(race: Race, name: str, seed: int, rate: float) -> Row:
    task = race.task(name)
    steps = max(8, 8 * round(60 * race.minutes * rate / 8))  # eighths are whole
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "run")
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        task.train(folder, steps, seed)
        wall = time.perf_counter() - started
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        curve = []
        for step in points(steps):
            last = step == steps
            scores = score(task, folder, step, race.train, race.test, SCORES if last else SCORES[:1])
            curve.append({"seconds": step / rate, **scores})
        shutil.rmtree(folder)
    cpu = spent.ru_utime + spent.ru_stime - before.ru_utime - before.ru_stime
    return {
        "contestant": race.called(name), "minutes": race.minutes, "seed": seed, "recipe": race.recipe.name,
        "overrides": list(race.overrides) if name == OURS else [], "batch": task.batch, "steps": steps,
        "images": steps * task.batch, "wall s": round(wall), "cpu s": round(cpu), "curve": curve,
    }  # fmt: skip


def score(task: Task, folder: Path, step: int, train: str, test: str, protocols: Sequence[str]) -> dict[str, float]:
    """Percent of right answers of an encoder: 20 neighbours, and logistic regression."""
    encoder, config = task.encoder(folder, step), task.config()
    size = config.data.views.global_.size
    torch.set_num_threads(task.threads)
    options = Options(protocols=tuple(protocols), ks=(20,))
    found = evaluate(encoder, train, test, options=options, image_size=size, beside=False)
    best = found.results[0].subject  # an average of the weights, where ours keeps one
    return {protocol: 100 * found.value(best, protocol) for protocol in protocols}


def _line(row: Row) -> str:
    last = row["curve"][-1]
    scores = ", ".join(f"{name} {last[name]:.1f}" for name in SCORES)
    return f"{row['contestant']}, {row['minutes']:g} min, seed {row['seed']}: {scores} ({row['wall s']} s)"


def as_table(found: dict[str, Any]) -> str:
    """Markdown: every contestant at every duration, the mean of its seeds with the lowest and the highest."""
    lines = [
        "| minutes | contestant | images/s | images seen | 20-NN | logistic | seeds | CPU minutes a run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[float, str], list[Row]] = {}
    for row in found["rows"]:
        groups.setdefault((row["minutes"], row["contestant"]), []).append(row)
    for (minutes, name), rows in sorted(groups.items(), key=lambda item: (item[0][0], -_mean(item[1], "logistic"))):
        images = rows[0]["images"]
        scores = " | ".join(_spread(rows, each) for each in SCORES)
        cpu = fmean(row["cpu s"] for row in rows) / 60
        rate = found["rates"][name] * rows[0]["batch"]
        lines.append(f"| {minutes:g} | {name} | {rate:.0f} | {images:,} | {scores} | {len(rows)} | {cpu:.0f} |")
    return "\n".join(lines)


def _mean(rows: list[Row], protocol: str) -> float:
    return fmean(row["curve"][-1][protocol] for row in rows)


def _spread(rows: list[Row], protocol: str) -> str:
    each = [row["curve"][-1][protocol] for row in rows]
    return f"{fmean(each):.1f} ({min(each):.1f} to {max(each):.1f})" if len(each) > 1 else f"{each[0]:.1f}"


def picture(found: dict[str, Any], path: Path) -> None:
    """20-NN against seconds of training, a curve for each contestant at its longest duration: the mean of its seeds, and
    their range. Raises UserError where matplotlib is absent."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise UserError("a plot needs matplotlib: pip install 'lejepa_scale[report]'.") from error
    longest = max(row["minutes"] for row in found["rows"])
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name in dict.fromkeys(row["contestant"] for row in found["rows"]):
        curves = [row["curve"] for row in found["rows"] if (row["contestant"], row["minutes"]) == (name, longest)]
        if not curves:
            continue
        seconds = [point["seconds"] for point in curves[0]]
        heights = [[curve[i]["knn"] for curve in curves] for i in range(len(seconds))]
        line = axes.plot(seconds, [fmean(each) for each in heights], marker="o", label=name)[0]
        axes.fill_between(
            seconds, [min(e) for e in heights], [max(e) for e in heights], alpha=0.2, color=line.get_color()
        )
    axes.set(xlabel="seconds of training", ylabel="20-NN, % of test images")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
    pyplot.close(figure)
