"""A training run: check, join the other ranks, go on where the newest checkpoint stands, then step after step. What happens
between steps is in actions.py."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from functools import partial

from lejepa_scale.checkpoint import Progress, Store
from lejepa_scale.checkpoint.files import write_text
from lejepa_scale.checkpoint.places import Place, place
from lejepa_scale.config import Config, dump, in_steps
from lejepa_scale.config.durations import length_of, steps_of
from lejepa_scale.errors import Exit, UserError
from lejepa_scale.parallel import collectives, process_group
from lejepa_scale.training import actions
from lejepa_scale.training.evaluating import Evaluate
from lejepa_scale.training.guard import Guard
from lejepa_scale.training.held_out import open_held_out
from lejepa_scale.training.lock import locked
from lejepa_scale.training.monitor import Monitor, Phases
from lejepa_scale.training.reporting import Reporter
from lejepa_scale.training.resume import begin_anew, resume, write_config
from lejepa_scale.training.run import Action, Run
from lejepa_scale.training.schedule import lambda_at, learning_rate, weight_decay
from lejepa_scale.training.signals import NOW, SOON, StopSignal
from lejepa_scale.training.start import (
    check_everything,
    first_weights,
    open_together,
    start_average,
    start_engine,
    start_probe,
    started,
)
from lejepa_scale.training.step import Phase, StepResult, train_step
from lejepa_scale.training.stopping import StopRequest
from lejepa_scale.training.summary import summary
from lejepa_scale.training.watchdog import Watchdog, in_words

logger = logging.getLogger(__name__)

EXIT_STATUS = "exit_status"  # a file in run.dir
Doing = Callable[..., AbstractContextManager[None]]


def train(config: Config) -> bool:
    """Run (or go on with) the training that `config` describes. Whether it is finished; if not, it was asked to stop, and
    is saved.

    Called on every rank, under `python`, torchrun or the deepspeed launcher. Raises UserError, whose status tells a fault
    while it trained from what was wrong before.
    """
    plan, shapes = check_everything(config)
    timeout = timedelta(minutes=config.engine.timeout_minutes)
    with (
        StopSignal(*SOON) as soon,
        process_group.joined(timeout) as device,
        _alone_in(config.run.dir),
        ExitStack() as stack,
    ):
        _leaving(config, None)
        now = StopSignal(*NOW)  # which end what has not begun to train at once
        request = StopRequest(config, soon, now)
        kept = config.checkpoint
        root = place(kept.dir) if kept.dir is not None else None
        store = Store(config.run.dir, kept.keep, kept.keep_every, kept.best, root)
        if root not in (None, config.run.dir):
            stack.enter_context(_alone_in(root))
        collectives.on_rank_zero(lambda: begin_anew(config, store), "moving the run before aside")
        begin = first_weights(config, store, shapes)  # refused before shards are fetched and indexed
        mixture, held = open_together(config), open_held_out(config)
        given, config = (
            config,
            collectives.everywhere(partial(in_steps, config, mixture.num_samples), "taking durations"),
        )
        store.keep_every = config.checkpoint.keep_every
        saved, probe_state, progress = resume(config, store, mixture)
        progress.epoch, progress.durations = mixture.num_samples, steps_of(config)
        if progress.step >= config.train.steps:
            key, _ = length_of(given)
            logger.info("%s is trained to step %d already; raise %s to go on.", config.run.dir, progress.step, key)
            return _leaving(config, Exit.DONE)
        watchdog = stack.enter_context(Watchdog(config.run.dir, timeout, step=progress.step))
        stack.enter_context(in_words(watchdog))
        with watchdog.doing("building the engine"):
            engine = start_engine(config, plan, device, saved, begin=begin, shapes=shapes)
            average = start_average(config, engine, saved)
            probe = start_probe(config, engine, mixture.num_classes, probe_state)
        del saved, begin
        collectives.on_rank_zero(lambda: write_config(given), "writing config.yaml")
        if process_group.rank() == 0:
            logger.info(summary(config, plan, mixture, shapes, device, progress.step, given))
        with (
            started(config, plan, mixture, engine, probe, progress) as run,
            now,
            _reporting(config, progress.step, watchdog.doing) as reporter,
            _faults(progress),
        ):
            of_probe = actions.Probe(device)
            phases = Phases(watchdog.doing)
            monitor = Monitor(config.run.dir, phases, device)
            report = actions.Report(run, reporter, monitor, [of_probe.reading] if probe is not None else [])
            averaging = [actions.Averaging(run, average)] if average is not None else []
            evaluating = [Evaluate(run, reporter, held, average)] if held is not None else []

            def metrics() -> actions.Record:
                return report.last | {name: value for one in evaluating for name, value in one.now().items()}

            stop = actions.Stop(request)
            save = actions.Save(run, store, average, metrics, dump(given), stop.at_once)
            loop(
                run,
                [actions.quarantine, stop, of_probe, Guard(), *averaging, report, *evaluating, save],
                phases,
                watchdog.step,
            )
            collectives.barrier()
        return _leaving(config, Exit.STOPPED if run.stopping else Exit.DONE)


def _leaving(config: Config, status: Exit | None) -> bool:
    """Leave the status behind for scripts, since some launchers let none through; none for a run that trains, so that what
    ends otherwise has none. Whether the run is finished."""
    if process_group.rank() == 0:
        path = config.run.dir / EXIT_STATUS
        if status is None:
            path.unlink(missing_ok=True)
        else:
            write_text(path, f"{status.value}\n")
    return status == Exit.DONE


@contextmanager
def _faults(progress: Progress) -> Iterator[None]:
    """What goes wrong once a start has taken a step may go better the next time; what does before, the data that cannot be
    read, will not."""
    first = progress.step
    try:
        yield
    except UserError as error:
        if progress.step > first:
            error.status = Exit.FAULT
        raise


@contextmanager
def _alone_in(run_dir: Place) -> Iterator[None]:
    """The lock of a directory, which rank 0 holds for all. Raises UserError, on every rank."""
    with ExitStack() as stack:
        collectives.on_rank_zero(lambda: stack.enter_context(locked(run_dir)), "taking the lock of run.dir")
        yield


@contextmanager
def _reporting(config: Config, step: int, doing: Doing) -> Iterator[Reporter]:
    """Rank 0's reporter, whose service may be slow to answer at both ends."""
    active = process_group.rank() == 0
    with doing(opening := "opening the log", unlimited=True):
        reporter = collectives.everywhere(lambda: Reporter(config, step, active=active), opening)
    try:
        yield reporter
    except BaseException:
        reporter.close()
        raise
    with doing(closing := "closing the log", unlimited=True):
        collectives.everywhere(reporter.close, closing)


def next_step(run: Run, phase: Phase, *, more: bool = True) -> StepResult:
    """Take the step that the run stands before. more: another one follows, if the run has one."""
    config, number = run.config, run.progress.step
    run.lr = learning_rate(number, config.train.steps, config.optim)
    result = train_step(
        run.engine,
        run.plan,
        run.feed.of_step(number, more=more and number + 1 < config.train.steps),
        number=number,
        seed=config.run.seed,
        lr=run.lr,
        weight_decay=weight_decay(number, config.train.steps, config.optim),
        lambda_=lambda_at(number, config.train.steps, config.objective),
        exact=config.objective.accumulation == "exact",
        phase=phase,
    )
    run.progress.step = number + 1
    return result


def loop(
    run: Run,
    after_step: Sequence[Action],
    doing: Doing = lambda name, *, unlimited=False: nullcontext(),
    begins: Callable[[int], None] = lambda number: None,
) -> None:
    """Step after step until the last one, or until an action lets the run stop. An action with a name of what it is `doing`
    may take as long as it likes. doing: wraps the parts of a step and such actions, by name. begins: is told each step."""
    run.feed.phase = doing
    for number in range(run.progress.step, run.config.train.steps):
        begins(number)
        result = next_step(run, doing)
        for action in after_step:
            name = getattr(action, "doing", "")
            with doing(name, unlimited=True) if name else nullcontext():
                action(run, result)
        if run.stopping:
            return
