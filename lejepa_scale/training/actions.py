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

from lejepa_scale.checkpoint import Saver, Store
from lejepa_scale.checkpoint.saver import NotSaved
from lejepa_scale.config import dump
from lejepa_scale.cost import peak_flops, step_flops
from lejepa_scale.data.faults import append_to_quarantine
from lejepa_scale.engine import Average
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.spectrum import effective_rank
from lejepa_scale.parallel import collectives, process_group
from lejepa_scale.training.reporting import Means, Reporter
from lejepa_scale.training.run import Run
from lejepa_scale.training.signals import StopSignal
from lejepa_scale.training.step import StepResult

logger = logging.getLogger(__name__)
T = TypeVar("T")
Record = dict[str, float | None]  # a line of metrics.jsonl
Gauge = Callable[[], dict[str, float]]  # what it has measured since it was last read


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
        self.hits = torch.zeros(2, dtype=torch.float64, device=device)

    def __call__(self, run: Run, result: StepResult) -> None:
        if run.probe is None or not bool(result.finite):
            return
        for out, labels in zip(result.outputs, run.feed.labels, strict=True):
            self.hits += run.probe.step(out["features"], labels.to(run.device, non_blocking=True))

    def reading(self) -> dict[str, float]:
        if not self.hits[1]:
            return {}
        accuracy = float(self.hits[0] / self.hits[1])
        self.hits.zero_()
        return {"probe_accuracy": accuracy}


class Guard:
    """Count steps whose gradient is not finite, and stop the run after too many in a row. The engine has left
    everything as it was. Raises UserError, on every rank."""

    def __init__(self) -> None:
        self.in_a_row = 0

    def __call__(self, run: Run, result: StepResult) -> None:
        if bool(result.finite):
            self.in_a_row = 0
            return
        self.in_a_row += 1
        run.progress.nonfinite += 1
        keys, step = run.feed.keys, run.progress.step
        shown = ", ".join(keys[:8]) + (", ..." if len(keys) > 8 else "")
        logger.info("step %d: the gradient is not finite; skipped on every rank. Samples here: %s", step, shown)
        limit = run.config.train.max_nonfinite
        if self.in_a_row >= limit:
            error = UserError(
                f"{limit} non-finite steps in a row up to step {step} (train.max_nonfinite = {limit}). "
                f"Lower optim.lr = {run.config.optim.lr:g} or set optim.clip_norm; the last checkpoint is untouched."
            )
            error.everywhere = True
            raise error


class Report:
    """Means since the last record over steps that were not skipped (NaN where all were), rates, and what the gauges say,
    as one record every `log.every` steps."""

    def __init__(self, run: Run, reporter: Reporter, gauges: Sequence[Gauge] = ()) -> None:
        self.reporter, self.gauges, self.means = reporter, gauges, Means()
        self.since, self.steps = time.monotonic(), 0
        self.last: Record = {}
        peak = peak_flops(run.device)
        self.seconds_at_peak = step_flops(run.config, run.plan).total / peak if peak else None

    def __call__(self, run: Run, result: StepResult) -> None:
        if bool(result.finite):
            for out in result.outputs:
                self.means.add(loss=out["loss"], loss_prediction=out["prediction"], loss_sigreg=out["sigreg"])
            self.means.add(grad_norm=result.grad_norm)
        self.steps += 1
        self.reporter.advance()
        if run.progress.step % run.config.log.every == 0 or run.last:
            self.last = self.reporter.log(self._record(run, result))
            self.since, self.steps = time.monotonic(), 0

    def _record(self, run: Run, result: StepResult) -> dict[str, float]:
        config, progress, seconds = run.config, run.progress, time.monotonic() - self.since
        batch = config.train.global_batch
        means = self.means.read() or dict.fromkeys(("loss", "loss_prediction", "loss_sigreg", "grad_norm"), math.nan)
        record = {"step": progress.step, **means, "lr": run.lr, "samples": progress.step * batch}
        record["loss_normalized"] = record["loss"] / config.objective.lambda_**0.4
        record["images_per_second"] = self.steps * batch / seconds
        record["data_wait_fraction"] = run.feed.waited() / seconds
        embeddings = result.outputs[-1]["embeddings"]
        record["effective_rank"] = effective_rank(embeddings) if bool(result.finite) else math.nan
        record |= {"nonfinite_steps": progress.nonfinite, "skipped_images": progress.skipped_images}
        if self.seconds_at_peak is not None:
            record["mfu"] = self.steps * self.seconds_at_peak / seconds
        for gauge in self.gauges:
            record |= gauge()
        return record


class Stop:
    """Let the run end after this step where a signal reached any rank."""

    def __init__(self, signal: StopSignal) -> None:
        self.signal = signal

    def __call__(self, run: Run, result: StepResult) -> None:
        run.stopping = collectives.any_rank(self.signal.asked, torch.device("cpu")) and not run.last


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
    waited for. metrics: the last record of the run, which becomes part of a checkpoint."""

    def __init__(
        self, run: Run, store: Store, average: Average | None = None, metrics: Callable[[], Record] = dict
    ) -> None:
        self.metrics, self.best_is_known = metrics, False
        self.saver = Saver(store, run.engine, average, staged=run.config.checkpoint.mode == "async")
        self.seconds_before = run.progress.seconds

    def __call__(self, run: Run, result: StepResult) -> None:
        settings, step = run.config.checkpoint, run.progress.step
        if settings.best and not self.best_is_known and (record := self.metrics()):
            collectives.on_rank_zero(partial(_expect_metric, settings.best, record))
            self.best_is_known = True
        self._try(run, self.saver.poll)
        if not (step % settings.every == 0 or run.last or run.stopping):
            return
        self._try(run, self.saver.finish)
        self._try(run, lambda: self._begin(run))
        if settings.mode == "async" and not (run.last or run.stopping):
            return
        path = self._try(run, self.saver.finish)
        if run.stopping and path:
            logger.info("stopped by a signal after step %d; saved %s. The same command goes on from here.", step, path)

    def _begin(self, run: Run) -> None:
        probe = run.probe.state_dict() if run.probe is not None else {}
        run.progress.seconds = self.seconds_before + time.monotonic() - run.started
        self.saver.begin(run.progress, probe, dump(run.config), self.metrics())

    def _try(self, run: Run, work: Callable[[], T]) -> T | None:
        """A save that fails stops the run, or is only told of. Numbers that are none stop it in any case."""
        try:
            return work()
        except NotSaved as error:
            if run.config.checkpoint.on_error == "stop" or run.last:
                raise
            if process_group.rank() == 0:
                logger.warning("%s The run goes on (checkpoint.on_error = continue).", error)
            return None


def _expect_metric(best: str, record: Record) -> None:
    if (metric := best.partition(":")[2]) not in record:
        raise UserError(
            f"checkpoint.best={best}: the run has no metric of that name; it has {', '.join(sorted(record))}."
            + (" probe_accuracy needs shards with labels and probe.enabled." if metric == "probe_accuracy" else "")
        )
