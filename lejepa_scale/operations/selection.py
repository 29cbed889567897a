"""Which of several runs to keep, without labels: by final loss / lambda^alpha (arXiv 2511.08544, section 6), with how sure
the order is. Refuses to compare losses that do not mean the same."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from lejepa_scale.checkpoint import Saved, find
from lejepa_scale.checkpoint.metrics import METRICS, read_metrics
from lejepa_scale.config import Config, in_steps, plan_batches
from lejepa_scale.config.batches import images_of_statistic
from lejepa_scale.config.durations import length_of
from lejepa_scale.config.keys import as_text, values_of
from lejepa_scale.errors import UserError
from lejepa_scale.operations.runs import config_of, runs_in
from lejepa_scale.training.schedule import lambda_at

ALPHA = 0.4  # of the paper
WINDOW = 0.1  # of a run's steps, at its end
FEW = 5  # records that a window has at least, if there are so many; of fewer the noise is hardly known
DRAWS = 2000
_LAMBDA, SEED = "objective.lambda", "run.seed"
# What a loss depends on besides how good the encoder is. The number of slices is not among them: it changes the noise alone.
_MEANING = ("data.exif", "data.channels", "data.mean", "data.std", "data.views", "data.augment", "objective")
_MEANING_TOO = ("model.projector.dim", "model.predictor")
_NOT = (
    _LAMBDA,
    "objective.final_lambda",
    *(f"objective.sigreg.{name}" for name in ("num_slices", "communication", "backend", "tf32")),
    "objective.visreg.num_slices",
)
_NOT_SHOWN = ("run.dir", "engine.", "checkpoint.", "log.", "probe.", "data.workers", "data.prefetch", "data.shards")
DATA, SAMPLES = "the images of data.shards", "images that the regularizer meets at once"


@dataclass(frozen=True)
class Candidate:
    """A run, as far as its loss tells of it."""

    name: str
    path: Path
    config: Config
    step: int  # of its newest checkpoint; 0: it has none
    steps: tuple[int, ...]  # of the records in its window
    losses: tuple[float, ...]  # of each: a mean over log.every steps, its terms weighed by `lam`
    meaning: dict[str, str]  # what its loss depends on, by key

    @property
    def lam(self) -> float:
        """At the last of its records."""
        last = self.steps[-1] if self.steps else self.step
        return lambda_at(max(0, last - 1), self.config.train.steps, self.config.objective)

    @property
    def finished(self) -> bool:
        return self.step > 0 and self.step >= self.config.train.steps

    @property
    def loss(self) -> float:
        """Its mean over the window; NaN where there is none."""
        return float(np.mean(self.losses)) if self.losses else math.nan

    def score(self, alpha: float) -> float:
        return self.loss / self.lam**alpha

    @property
    def order(self) -> tuple[Any, ...]:
        """Runs for which this is equal met the same images at the same steps, so that they share its noise."""
        config = self.config
        of_data = (config.run.seed, config.data.shuffle_block, config.train.global_batch, self.meaning[DATA])
        return (*of_data, self.steps)


@dataclass(frozen=True)
class Ranked:
    """A group of runs that differ in their seed alone, most often one run, and its place."""

    runs: tuple[Candidate, ...]
    loss: float
    score: float  # loss / lambda^alpha; NaN: it has no finite loss at its end
    low: float  # 95 % interval of the score
    high: float
    best: float  # share of resamplings in which it is the best
    places: tuple[int, int]  # 95 % interval of its place, from 1

    @property
    def name(self) -> str:
        return ", ".join(run.name for run in self.runs)


@dataclass(frozen=True)
class Selection:
    """Best first; runs without a finite loss last."""

    ranked: list[Ranked]
    alpha: float
    differing: list[str]  # keys in which the runs differ
    left_out: list[str]  # unfinished ones, said in words

    @property
    def tied(self) -> list[str]:
        """Those that are not told apart from the best: the best in 5 % of the resamplings or more."""
        return [one.name for one in self.ranked[1:] if one.best >= 0.05]


def read_run(path: Path, window: float = WINDOW) -> Candidate:
    """A run from its directory. window: share of its steps, at the end, whose mean loss counts; 5 records at least. Raises
    UserError for a configuration or a checkpoint that cannot be read."""
    if not 0 < window <= 1:
        raise UserError(f"--window is the share of a run's steps at its end, above 0 and up to 1, not {window:g}.")
    config = config_of(path)
    records = [record for record in read_metrics(path / METRICS) if "loss" in record]
    try:
        saved = Saved(find(config.checkpoint.dir or path))
    except UserError:
        if records and config.train.steps is not None and records[-1]["step"] >= config.train.steps:
            raise
        return Candidate(path.name, path, config, 0, (), (), {})
    if saved.progress.epoch:
        config = in_steps(config, saved.progress.epoch)
    if config.train.steps is None:  # in words, of a state that another trainer made
        return Candidate(path.name, path, config, 0, (), (), {})
    last = int(records[-1]["step"]) if records else 0
    inside = [record for record in records if record["step"] > last - window * last]
    inside = inside if len(inside) >= FEW else records[-FEW:]
    known = [(int(record["step"]), _loss(record, last, config)) for record in inside]
    finite = [(step, float(loss)) for step, loss in known if isinstance(loss, int | float) and math.isfinite(loss)]
    finite = finite if len(finite) == len(known) else []
    meaning = {
        key: as_text(value)
        for key, value in values_of(config)
        if (key in _MEANING_TOO or any(key == part or key.startswith(f"{part}.") for part in _MEANING))
        and key not in _NOT
    }
    meaning[DATA] = saved.progress.data_fingerprint or as_text([s.shards for s in config.data.shards])
    meaning[SAMPLES] = str(images_of_statistic(config, plan_batches(config, saved.ranks)))
    return Candidate(
        path.name,
        path,
        config,
        saved.progress.step,
        tuple(step for step, _ in finite),
        tuple(loss for _, loss in finite),
        meaning,
    )


def _loss(record: dict[str, Any], last: int, config: Config) -> Any:
    """What stands for the loss of a record; where lambda moves, with the weights of step `last`, so that all of a window
    mean the same."""
    objective = config.objective
    prediction, regularizer = record.get("loss_prediction"), record.get("loss_sigreg")
    if objective.final_lambda is None or prediction is None or regularizer is None:
        return record["loss"]
    weight = lambda_at(max(0, last - 1), config.train.steps, objective)
    return (1 - weight if objective.weighting == "convex" else 1.0) * prediction + weight * regularizer


def select(
    paths: Sequence[Path],
    *,
    alpha: float = ALPHA,
    window: float = WINDOW,
    across: Sequence[str] = (),
    unfinished: bool = False,
    seed: int = 0,
) -> Selection:
    """Runs in the order of their final loss / lambda^alpha, the smallest first.

    paths: run directories, or folders with some below. across: keys that may differ nevertheless, as `data.views`.
    unfinished: rank also runs that have not taken all of their steps; they are left out else. Runs that differ in run.seed
    alone count as repeats of one. lambda, where it moves (objective.final_lambda), is that of the last record. How sure
    the order is: the records of each window are drawn again with replacement, 2,000 times, the same steps for runs that
    met the same images; so are repeats. Raises UserError for fewer than two runs, and where losses do not mean the same:
    other images, views, colours, objective, embedding width or batch of the regularizer.
    """
    found = _named_apart([read_run(path, window) for path in runs_in(paths)])
    partly = [run for run in found if not (run.finished or (unfinished and run.step))]
    left_out = [
        f"{run.name} stands at step {run.step} of {run.config.train.steps or length_of(run.config)[1]}"
        for run in partly
    ]
    found = [run for run in found if run not in partly]
    if len(found) < 2:
        why = f"; left out: {'; '.join(left_out)} (--unfinished takes them in)" if left_out else ""
        raise UserError(f"a selection is among two runs or more, and there {_are(len(found))}{why}.")
    _refuse_others(found, across)
    groups = _groups(found)
    scores = np.array([[run.score(alpha) for run in group] for group in groups], dtype=object)
    drawn = _resampled(groups, alpha, seed)  # [draws, groups]
    means = [float(np.mean(row)) for row in scores]
    order = sorted(range(len(groups)), key=lambda i: (math.isnan(means[i]), means[i]))
    places = np.argsort(np.argsort(np.where(np.isnan(drawn), np.inf, drawn), axis=1, kind="stable"), axis=1) + 1
    ranked = [
        Ranked(
            tuple(groups[i]),
            float(np.mean([run.loss for run in groups[i]])),
            means[i],
            *_interval(drawn[:, i]),
            float(np.mean(places[:, i] == 1)),
            (int(np.quantile(places[:, i], 0.025)), int(np.quantile(places[:, i], 0.975))),
        )
        for i in order
    ]
    return Selection(ranked, alpha, _differing(found), left_out)


def _named_apart(runs: list[Candidate]) -> list[Candidate]:
    """Runs of one name in several folders have their folder's too."""
    count = Counter(run.name for run in runs)
    return [run if count[run.name] == 1 else replace(run, name=f"{run.path.parent.name}/{run.name}") for run in runs]


def _are(count: int) -> str:
    return {0: "is none", 1: "is one"}.get(count, f"are {count}")


def _refuse_others(runs: Sequence[Candidate], across: Sequence[str]) -> None:
    """Raises UserError where the losses of these runs do not mean the same."""
    first, faults = runs[0], []
    keys = {key for run in runs for key in run.meaning}
    allowed = [part for part in across if any(key == part or key.startswith(f"{part}.") for key in keys)]
    short = {"data.shards": DATA, "train.global_batch": SAMPLES}
    for part in across:
        if part not in allowed and part not in short:
            raise UserError(
                f"--across {part}: no comparison is refused for that key. Those are {', '.join(sorted(keys))}."
            )
    passed = {short[part] for part in across if part in short}
    for key in sorted(keys):
        if key in passed or any(key == part or key.startswith(f"{part}.") for part in allowed):
            continue
        other = next((run for run in runs if run.meaning.get(key) != first.meaning.get(key)), None)
        if other is not None:
            ours, theirs = (run.meaning.get(key, "unset") for run in (first, other))
            faults.append(f"{key}: {ours} in {first.name}, {theirs} in {other.name}")
    if faults:
        raise UserError(
            f"these runs' losses do not mean the same, so that their order would tell nothing. {'; '.join(faults)}. Name "
            "runs that agree in these, or compare by labels (lejepa evaluate)."
        )


def _groups(runs: Sequence[Candidate]) -> list[list[Candidate]]:
    """Repeats of one another side by side."""
    groups: dict[tuple[tuple[str, str], ...], list[Candidate]] = {}
    for run in runs:
        same = tuple((k, as_text(v)) for k, v in values_of(run.config) if k != SEED and not k.startswith(_NOT_SHOWN))
        groups.setdefault(same, []).append(run)
    return list(groups.values())


def _resampled(groups: Sequence[Sequence[Candidate]], alpha: float, seed: int) -> Float[np.ndarray, "draws groups"]:
    """Scores of every group with records, and repeats, drawn again."""
    generator, out = np.random.default_rng(seed), np.full((DRAWS, len(groups)), np.nan)
    shared: dict[tuple[Any, ...], Any] = {}
    for number, group in enumerate(groups):
        of_runs = []
        for run in group:
            if not run.losses:
                of_runs.append(np.full(DRAWS, np.nan))
                continue
            count = len(run.losses)
            if run.order not in shared:
                shared[run.order] = generator.integers(count, size=(DRAWS, count))
            means = np.asarray(run.losses)[shared[run.order]].mean(1)
            of_runs.append(means / run.lam**alpha)
        chosen = generator.integers(len(group), size=(DRAWS, len(group)))
        out[:, number] = np.take_along_axis(np.stack(of_runs, 1), chosen, 1).mean(1)
    return out


def _interval(values: Float[np.ndarray, " draws"]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _differing(runs: Sequence[Candidate]) -> list[str]:
    """Keys in which they differ, as their configurations have them."""
    trees = [{k: as_text(v) for k, v in values_of(run.config) if not k.startswith(_NOT_SHOWN)} for run in runs]
    keys = dict.fromkeys(key for tree in trees for key in tree)
    return [key for key in keys if len({tree.get(key) for tree in trees}) > 1]
