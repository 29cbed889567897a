"""What happens between steps, in the order in which the loop is given it: each action is called as action(run, result)
on every rank, and may use collectives. A new one (evaluation, heartbeat) is one more function or class of this signature."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from lejepa_scale.checkpoint import Saver, Store
from lejepa_scale.checkpoint.saver import NotSaved
from lejepa_scale.config import dump
from lejepa_scale.config.batches import images_of_statistic
from lejepa_scale.cost import peak_flops, step_flops
from lejepa_scale.data.faults import append_to_quarantine
from lejepa_scale.engine import Average
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.spectrum import covariance, effective_rank_of
from lejepa_scale.parallel import collectives, process_group
from lejepa_scale.parallel.launch import Launcher
from lejepa_scale.training.collapse import CollapseWatch
from lejepa_scale.training.evaluating import PREFIX
from lejepa_scale.training.late import Late
from lejepa_scale.training.monitor import Monitor
from lejepa_scale.training.reporting import Means, Reporter
from lejepa_scale.training.run import Run
from lejepa_scale.training.step import StepResult
from lejepa_scale.training.stopping import REASONS, StopRequest, too_slow_to_stop

logger = logging.getLogger(__name__)
T = TypeVar("T")
Record = dict[str, float | None]  # a line of metrics.jsonl
Gauge = Callable[[], dict[str, Float[Tensor, ""]]]  # what it has measured since it was last read, on the device


def quarantine(run: Run, result: StepResult) -> None:
    """Name, count and list the samples that had to be replaced."""
    faults, step = run.feed.faults, run.progress.step
    if not faults:
        return
    run.progress.skipped_images += len(faults)
    for fault in faults:
        logger.info("step %d: replaced %s", step, fault)
    if process_group.rank() == 0:
        append_to_quarantine(run.config.run.dir / "quarantine.jsonl", faults, step)


class Probe:
    """Train the online probe on the step's features, and keep its hits until they are read. A skipped step teaches
    nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.hits = device, torch.zeros(2, dtype=torch.float64, device=device)

    def __call__(self, run: Run, result: StepResult) -> None:
        if run.probe is None:
            return
        for out, labels in zip(result.outputs, run.feed.labels, strict=True):
            labels = labels.to(run.device, non_blocking=True)
            self.hits = self.hits + run.probe.step(out["features"], labels, result.finite)

    def reading(self) -> dict[str, Tensor]:
        hits, self.hits = self.hits, torch.zeros_like(self.hits)
        return {"probe_accuracy": hits[0] / hits[1]}


class Report:
    """Means since the last record over steps that were not skipped (NaN where all were), rates, and what the monitor and the
    gauges say, as one record every `log.every` steps. A record's numbers are read, and it is written, after the next step,
    when they are there."""

    def __init__(self, run: Run, reporter: Reporter, monitor: Monitor, gauges: Sequence[Gauge] = ()) -> None:
        self.reporter, self.monitor, self.gauges, self.means = reporter, monitor, gauges, Means()
        self.since, self.steps = time.monotonic(), 0
        self.last: Record = {}
        self._unread: tuple[Late, dict[str, float]] | None = None
        self.samples = images_of_statistic(run.config, run.plan)
        self.collapse = CollapseWatch(run.config, self.samples)
        peak = peak_flops(run.device)
        self.seconds_at_peak = step_flops(run.config, run.plan).total / peak if peak else None

    def __call__(self, run: Run, result: StepResult) -> None:
        self._write(run)
        for out in result.outputs:
            self.means.add(
                result.finite, loss=out["loss"], loss_prediction=out["prediction"], loss_sigreg=out["sigreg"]
            )
        self.means.add(result.finite, grad_norm=result.grad_norm)
        self.steps += 1
        self.reporter.advance()
        if run.progress.step % run.config.log.every == 0 or run.last:
            self._unread = self._on_the_device(result), self._known(run)
            self.since, self.steps, run.beside = time.monotonic(), 0, 0.0
        if run.settles:
            self._write(run)

    def _on_the_device(self, result: StepResult) -> Late:
        read = {name: value for gauge in self.gauges for name, value in gauge().items()}
        spread = torch.where(result.finite, covariance(result.outputs[-1]["embeddings"]), math.nan)
        return Late({**self.means.take(), **read, _COVARIANCE: spread})

    def _known(self, run: Run) -> dict[str, float]:
        progress, seconds = run.progress, time.monotonic() - self.since - run.beside
        self.monitor.begin(progress.step, self.steps, seconds)
        batch = run.config.train.global_batch
        known = {"step": progress.step, "lr": run.lr, "lambda": run.lambda_, "samples": progress.step * batch}
        known["images_per_second"] = self.steps * batch / seconds
        known["skipped_images"] = progress.skipped_images
        if self.seconds_at_peak is not None:
            known["mfu"] = self.steps * self.seconds_at_peak / seconds
        return known

    def _write(self, run: Run) -> None:
        if self._unread is None:
            return
        (late, known), self._unread = self._unread, None
        read = late.read()
        spread = read.pop(_COVARIANCE)
        known["effective_rank"] = effective_rank_of(spread)
        known["embedding_std"] = math.sqrt(float(spread.trace()) / (len(spread) * self.samples))
        self.collapse.look(int(known["step"]), known["effective_rank"], known["embedding_std"])
        record = known | self.monitor.read() | {name: float(value) for name, value in read.items()}
        record["loss_normalized"] = record["loss"] / record["lambda"] ** 0.4
        record["nonfinite_steps"] = run.progress.nonfinite
        self.last = self.reporter.log(record)


_COVARIANCE = "covariance of embeddings"
_HASTE = 0.8  # of a launcher's patience, which a save may take up without a word


class Stop:
    """Let the run end where any rank was asked to. Ranks tell one another while the next step runs, and end after it."""

    def __init__(self, request: StopRequest) -> None:
        self.request = request
        self._told: Callable[[], Tensor] | None = None

    def __call__(self, run: Run, result: StepResult) -> None:
        why = self._heard()
        if process_group.world_size() == 1:
            why = self.request.reason()
        elif not (why or run.last):
            self._told = collectives.begin_sum(self._mine())
        run.stopping = "" if run.last else why
        if run.stopping:
            self.request.met()

    def at_once(self) -> str:
        """Why, where any rank was asked to by now. Every rank calls, and waits."""
        why = self._heard() or _named(collectives.all_reduce_sum(self._mine()))
        if why:
            self.request.met()
        return why

    def _mine(self) -> Tensor:
        reason = self.request.reason()
        return torch.tensor([int(reason == one) for one in REASONS])

    def _heard(self) -> str:
        told, self._told = self._told, None
        return "" if told is None else _named(told())


def _named(ranks: Tensor) -> str:
    """The first of REASONS that a rank gave."""
    return next((reason for reason, count in zip(REASONS, ranks.tolist(), strict=True) if count), "")


class Averaging:
    """Take the weights into their average every `average.every` steps, from `average.start` on."""

    def __init__(self, run: Run, average: Average) -> None:
        self.average, settings = average, run.config.average
        self.first, self.every = settings.begins * run.config.train.steps, settings.every

    def __call__(self, run: Run, result: StepResult) -> None:
        step = run.progress.step
        if step % self.every == 0 and (step > self.first or self.average.updates):
            self.average.update()


class Save:
    """Write a checkpoint every `checkpoint.every` steps, after the last step, and before the run stops. With
    `checkpoint.mode` async the next steps go on while it is written; at the end, and before the next one, it is
    waited for. metrics: the last record of the run, which becomes part of a checkpoint. config_yaml: the configuration as
    it was given; unset: that of the run, whose durations are in steps. asked: why the run is to stop, if it is: it does so
    where that came while the steps waited for a save, rather than save once more."""

    doing = "saving"

    def __init__(
        self,
        run: Run,
        store: Store,
        average: Average | None = None,
        metrics: Callable[[], Record] = dict,
        config_yaml: str | None = None,
        asked: Callable[[], str] = str,
    ) -> None:
        self.metrics, self.asked, self.best_is_known = metrics, asked, False
        self._begun, self._launcher = 0.0, Launcher()
        self.config_yaml = dump(run.config) if config_yaml is None else config_yaml
        self.saver = Saver(store, run.engine, average, staged=run.config.checkpoint.mode == "async")
        self.seconds_before = run.progress.seconds

    def __call__(self, run: Run, result: StepResult) -> None:
        settings, step = run.config.checkpoint, run.progress.step
        if settings.best and not self.best_is_known and (record := self.metrics()) and not _awaited(run, record):
            collectives.on_rank_zero(partial(_expect_metric, settings.best, record))
            self.best_is_known = True
        if self._try(run, self.saver.poll):
            self._saved(run)
        if not (step % settings.every == 0 or run.last or run.stopping):
            return
        if self._try(run, self.saver.finish):
            self._saved(run)
        self._try(run, lambda: self._begin(run))
        if settings.mode == "async" and not (run.last or run.stopping):
            return
        if not (path := self._try(run, self.saver.finish)):
            return
        self._saved(run)
        if not (run.last or run.stopping):
            run.stopping = self.asked()
        if run.stopping:
            logger.info(
                "stopped after step %d (%s); saved %s. The same command goes on from here.", step, run.stopping, path
            )

    def _saved(self, run: Run) -> None:
        """Tell, once, of a save that a launcher would not wait for."""
        seconds = time.monotonic() - self._begun
        if self._launcher.patience and seconds > _HASTE * self._launcher.patience:
            if process_group.rank() == 0:
                logger.warning(too_slow_to_stop(seconds, self._launcher, run.config.run.dir))
            self._launcher.patience = 0.0

    def _begin(self, run: Run) -> None:
        self._begun = time.monotonic()
        probe = run.probe.state_dict() if run.probe is not None else {}
        run.progress.seconds = self.seconds_before + time.monotonic() - run.started
        self.saver.begin(run.progress, probe, self.config_yaml, self.metrics())

    def _try(self, run: Run, work: Callable[[], T]) -> T | None:
        """A save that fails stops the run, or is only told of. Numbers that are none stop it in any case."""
        try:
            return work()
        except NotSaved as error:
            if run.config.checkpoint.on_error == "stop" or run.last or run.stopping:
                raise
            if process_group.rank() == 0:
                logger.warning("%s The run goes on (checkpoint.on_error = continue).", error)
            return None


def _awaited(run: Run, record: Record) -> bool:
    """Whether checkpoint.best is a metric of evaluations, of which there was none yet."""
    of_evaluation = f":{PREFIX}" in str(run.config.checkpoint.best) and run.config.evaluation.every is not None
    return of_evaluation and not any(name.startswith(PREFIX) for name in record)


def _expect_metric(best: str, record: Record) -> None:
    if (metric := best.partition(":")[2]) not in record:
        raise UserError(
            f"checkpoint.best={best}: the run has no metric of that name; it has {', '.join(sorted(record))}."
            + (" probe_accuracy needs shards with labels and probe.enabled." if metric == "probe_accuracy" else "")
        )
