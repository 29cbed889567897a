"""A training run: check, join the other ranks, go on where the newest checkpoint stands, then step after step. What happens
between steps is in actions.py."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

from lejepa_scale.checkpoint import Store
from lejepa_scale.checkpoint.places import Place, place
from lejepa_scale.config import Config
from lejepa_scale.parallel import collectives, process_group
from lejepa_scale.training import actions
from lejepa_scale.training.lock import locked
from lejepa_scale.training.reporting import Reporter
from lejepa_scale.training.resume import begin_anew, resume, write_config
from lejepa_scale.training.run import Action, Run
from lejepa_scale.training.schedule import learning_rate
from lejepa_scale.training.signals import StopSignal
from lejepa_scale.training.start import (
    check_everything,
    first_weights,
    open_together,
    start_average,
    start_engine,
    start_probe,
    started,
)
from lejepa_scale.training.step import train_step
from lejepa_scale.training.summary import summary

logger = logging.getLogger(__name__)


def train(config: Config) -> Path:
    """Run (or go on with) the training that `config` describes; the run directory.

    Called on every rank, under `python`, torchrun or the deepspeed launcher. Raises UserError.
    """
    plan, shapes = check_everything(config)
    timeout = timedelta(minutes=config.engine.timeout_minutes)
    with process_group.joined(timeout) as device, _alone_in(config.run.dir), ExitStack() as stack:
        kept = config.checkpoint
        root = place(kept.dir) if kept.dir is not None else None
        store = Store(config.run.dir, kept.keep, kept.keep_every, kept.best, root)
        if root not in (None, config.run.dir):
            stack.enter_context(_alone_in(root))
        collectives.on_rank_zero(lambda: begin_anew(config, store), "moving the run before aside")
        begin = first_weights(config, store, shapes)  # refused before shards are fetched and indexed
        mixture = open_together(config)
        saved, probe_state, progress = resume(config, store, mixture)
        if progress.step >= config.train.steps:
            logger.info("%s is trained to step %d already; raise train.steps to go on.", config.run.dir, progress.step)
            return config.run.dir
        engine = start_engine(config, plan, device, saved, begin=begin, shapes=shapes)
        average = start_average(config, engine, saved)
        del saved, begin
        probe = start_probe(config, engine, mixture.num_classes, probe_state)
        collectives.on_rank_zero(lambda: write_config(config), "writing config.yaml")
        if process_group.rank() == 0:
            logger.info(summary(config, plan, mixture, shapes, device, progress.step))
        with (
            started(config, plan, mixture, engine, probe, progress) as run,
            StopSignal() as signal,
            _reporting(config, progress.step) as reporter,
        ):
            of_probe = actions.Probe(device)
            report = actions.Report(run, reporter, gauges=[of_probe.reading] if probe is not None else [])
            averaging = [actions.Averaging(run, average)] if average is not None else []
            save, stop = actions.Save(run, store, average, metrics=lambda: report.last), actions.Stop(signal)
            loop(run, [actions.quarantine, stop, of_probe, actions.Guard(), *averaging, report, save])
            collectives.barrier()
    return config.run.dir


@contextmanager
def _alone_in(run_dir: Place) -> Iterator[None]:
    """The lock of a directory, which rank 0 holds for all. Raises UserError, on every rank."""
    with ExitStack() as stack:
        collectives.on_rank_zero(lambda: stack.enter_context(locked(run_dir)), "taking the lock of run.dir")
        yield


@contextmanager
def _reporting(config: Config, step: int) -> Iterator[Reporter]:
    """Rank 0's reporter, whose service may be slow to answer at both ends."""
    active = process_group.rank() == 0
    reporter = collectives.everywhere(lambda: Reporter(config, step, active=active), "opening the log")
    try:
        yield reporter
    except BaseException:
        reporter.close()
        raise
    collectives.everywhere(reporter.close, "closing the log")


def loop(run: Run, after_step: Sequence[Action]) -> None:
    """Step after step until the last one, or until an action lets the run stop."""
    config = run.config
    for number in range(run.progress.step, config.train.steps):
        run.lr = learning_rate(number, config.train.steps, config.optim)
        result = train_step(
            run.engine,
            run.plan,
            run.feed.of_step(number, more=number + 1 < config.train.steps),
            number=number,
            seed=config.run.seed,
            lr=run.lr,
            weight_decay=config.optim.weight_decay,
            exact=config.objective.accumulation == "exact",
        )
        run.progress.step = number + 1
        for action in after_step:
            action(run, result)
        if run.stopping:
            return
