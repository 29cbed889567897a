"""A small grid of runs over local processes: every combination of values is a run of its own, as `lejepa train` would start
it. Starting the same sweep again goes on. Refuses to look into a run beyond its files."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO

import torch

from lejepa_scale.checkpoint import Store
from lejepa_scale.checkpoint.files import write_text
from lejepa_scale.checkpoint.metrics import METRICS, read_metrics, steps_taken
from lejepa_scale.checkpoint.places import place
from lejepa_scale.checkpoint.saved import Saved
from lejepa_scale.config import Config, check_world, in_steps, load_config
from lejepa_scale.config.keys import as_text, values_of
from lejepa_scale.data import open_mixture
from lejepa_scale.errors import Exit, UserError
from lejepa_scale.operations.runs import config_of
from lejepa_scale.parallel.threads import cores
from lejepa_scale.progress import counter
from lejepa_scale.training.lock import locked
from lejepa_scale.training.signals import StopSignal

logger = logging.getLogger(__name__)
_POLL = 0.5  # seconds
_GRACE = 600.0  # seconds for a run to save, once it is asked to stop
# Of a run that is there already: what may differ from what is asked for now.
_MAY_CHANGE = (
    "run.dir",
    "train.steps",
    "train.epochs",
    "train.images",
    "checkpoint.",
    "log.",
    "data.workers",
    "data.prefetch",
    "engine.timeout_minutes",
)


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str
    overrides: tuple[str, ...]  # of the recipe, run.dir with them
    config: Config
    steps: int | None  # of the whole run; None where its data decides, and is not opened

    @property
    def dir(self) -> Path:
        return self.config.run.dir

    @property
    def done(self) -> int:
        """Steps that its newest checkpoint has."""
        kept = self.config.checkpoint.dir
        newest = Store(self.dir, keep=1, root=place(kept) if kept is not None else None).latest()
        return 0 if newest is None else Saved(newest).progress.step


@dataclass
class Outcome:
    """What became of the runs of a sweep, by name."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # with the last words of each
    stopped: bool = False  # the sweep, or a run, was asked to


def values_of_an_override(text: str) -> list[str]:
    """`a,b,c` as three values; commas inside brackets, braces or quotes separate nothing."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "[{(":
            depth += 1
        elif letter in ")}]":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += letter
    return parts


def grid(config: Path, overrides: Sequence[str], out: Path, ranks: int = 1) -> list[Point]:
    """Every combination of the values that overrides name with commas, each with its configuration, in `out`. ranks: of
    every run. Raises UserError for a configuration that is refused, naming the run, and where two would be one."""
    axes: list[list[tuple[str, str]]] = []
    for override in overrides:
        key, _, text = override.partition("=")
        values = values_of_an_override(text)
        if "" in values and len(values) > 1:
            raise UserError(f"{override}: a value is missing between two commas.")
        if len(set(values)) < len(values):
            raise UserError(f"{override}: a value is there twice.")
        axes.append([(key, value) for value in values])
    if "run.dir" in (key for axis in axes for key, _ in axis):
        raise UserError("run.dir is that of every run of a sweep: --out says where they are kept.")
    varied = [axis[0][0] for axis in axes if len(axis) > 1]
    points: dict[str, Point] = {}
    for combination in itertools.product(*axes):
        name = (
            "_".join(f"{_short(key, varied)}={_plain(value)}" for key, value in combination if key in varied) or "run"
        )
        given = [*(f"{key}={value}" for key, value in combination), f"run.dir={out / name}"]
        one = _named(name, partial(_checked, config, given, ranks))
        if name in points:
            raise UserError(f"two runs of the sweep would be {name}: give values that are told apart as file names.")
        points[name] = Point(name, tuple(given), one, one.train.steps)
    return list(points.values())


def with_steps(points: Sequence[Point], *, build: bool = True) -> list[Point]:
    """`points`, where the steps of a run depend on its data with these, as far as that can be opened: what cannot be is
    the run's own to tell of. Without `build`, only data that is indexed is read."""
    samples: dict[str, int | None] = {}
    found = []
    for point in points:
        data = point.config.data.model_dump_json()
        if point.steps is None and data not in samples:
            try:
                samples[data] = open_mixture(point.config.data, build=build).num_samples
            except UserError:
                samples[data] = None
        if point.steps is None and (count := samples[data]) is not None:
            point = replace(point, steps=_named(point.name, partial(in_steps, point.config, count)).train.steps)
        found.append(point)
    return found


def _named(name: str, make: Callable[[], Config]) -> Config:
    """Raises UserError with the run's name."""
    try:
        return make()
    except UserError as error:
        raise UserError(f"run {name} of the sweep: {error}") from error


def _checked(config: Path, overrides: list[str], ranks: int) -> Config:
    found = load_config(config, overrides)
    check_world(found, ranks)
    return found


def _short(key: str, keys: Sequence[str]) -> str:
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key


def _plain(value: str) -> str:
    """As a part of a file name."""
    return re.sub(r"[^\w.+-]+", "-", value.strip("[](){}'\" /")) or "-"


def sweep(
    config: Path,
    overrides: Sequence[str],
    out: Path,
    *,
    jobs: int = 1,
    ranks: int = 1,
    points: Sequence[Point] | None = None,
) -> Outcome:
    """Run every point of the grid that has steps to go, `jobs` at a time, each on `ranks` processes. What a run says is in
    `out`/logs. A run that fails is told of, and the others go on. SIGINT and SIGTERM let the runs save and stop.

    points: what `grid` gave, where it is at hand. Raises UserError as `grid` and `with_steps` do, where a run
    in `out` had other settings, where another sweep is at work there, and for more GPUs than there are.
    """
    points = with_steps(points or grid(config, overrides, out, ranks))
    devices = _devices(jobs, ranks)
    for point in points:
        _refuse_another(point)
    outcome = Outcome()
    with locked(out), StopSignal() as asked:
        manifest = {"config": str(config), "overrides": list(overrides), "runs": [point.name for point in points]}
        write_text(out / "sweep.json", json.dumps(manifest, indent=1))
        (out / "logs").mkdir(exist_ok=True)
        done = {point.name: point.done for point in points}
        waiting = [point for point in points if point.steps is None or done[point.name] < point.steps]
        outcome.finished += [point.name for point in points if point not in waiting]
        if outcome.finished:
            logger.info("%d of %d runs are finished already.", len(outcome.finished), len(points))
        total = sum(point.steps or 0 for point in points)
        with counter(out.name, unit="step", total=total, done=sum(done.values())) as progress:
            _work(waiting, devices, partial(_start, config, out, ranks), asked, outcome, done, progress.update)
    return outcome


@dataclass
class _Running:
    point: Point
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    devices: str | None
    since: float = field(default_factory=time.monotonic)


def _work(
    waiting: list[Point],
    free: list[str | None],
    start: Callable[[Point, str | None, int], _Running],
    asked: StopSignal,
    outcome: Outcome,
    done: dict[str, int],
    advance: Callable[[int], object],
) -> None:
    running: list[_Running] = []
    queue, latest = iter(waiting), math.inf
    try:
        while True:
            while free and not asked.asked and (point := next(queue, None)) is not None:
                running.append(start(point, free.pop(0), len(free) + len(running) + 1))
            if asked.asked and latest == math.inf:
                outcome.stopped = True
                logger.info("stopping: %d runs save first. The same command goes on from there.", len(running))
                _end(running, signal.SIGTERM)
                latest = time.monotonic() + _GRACE
            if time.monotonic() > latest:
                logger.warning("%d runs have not stopped in %.0f s, and are killed.", len(running), _GRACE)
                _end(running, signal.SIGKILL)
            if not running:
                return
            time.sleep(_POLL)
            for one in list(running):
                ended = one.process.poll() is not None
                now = max(done[one.point.name], steps_taken(one.point.dir))
                advance(now - done[one.point.name])
                done[one.point.name] = now
                if ended:
                    running.remove(one)
                    free.append(one.devices)
                    one.log.close()
                    _note(one, outcome)
    finally:
        _end(running, signal.SIGTERM)
        for one in running:
            try:
                one.process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                one.process.kill()
            one.log.close()


def _end(running: Sequence[_Running], how: signal.Signals) -> None:
    for one in running:
        if one.process.poll() is None:
            one.process.send_signal(how)


def _start(config: Path, out: Path, ranks: int, point: Point, devices: str | None, jobs: int) -> _Running:
    """The run in a process of its own, which a Ctrl-C at the terminal reaches by way of the sweep alone."""
    module = ["-m", "lejepa_scale", "train"]
    if ranks > 1:
        module = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *module]
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // (jobs * ranks))))
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = devices
    log = (out / "logs" / f"{point.name}.log").open("ab")
    words = [sys.executable, *module, "--config", str(config), *point.overrides]
    process = subprocess.Popen(
        words, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
    )
    return _Running(point, process, log, devices)


def _note(one: _Running, outcome: Outcome) -> None:
    """What became of a run that has ended."""
    point, status = one.point, one.process.returncode
    if status == Exit.DONE and (point.steps is None or point.done >= point.steps):
        outcome.finished.append(point.name)
        records = [r for r in read_metrics(point.dir / METRICS) if r.get("loss") is not None]
        loss = f", loss {records[-1]['loss']:.4g}" if records else ""
        logger.info("%s: %.0f s%s", point.name, time.monotonic() - one.since, loss)
    elif status == Exit.STOPPED:
        outcome.stopped = True
        logger.info("%s: asked to stop, and saved. The same sweep goes on with it.", point.name)
    elif not outcome.stopped:
        log = Path(one.log.name)
        outcome.failed[point.name] = _last_words(log)
        logger.error("%s failed (%s): %s All of it: %s", point.name, status, outcome.failed[point.name], log)


def _last_words(log: Path) -> str:
    """The error that a run ended with, else its last line."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", log.read_text(errors="replace")[-20_000:]) if line.strip()]
    errors = [line for line in lines if line.startswith("error")]
    return ([*lines[-1:], *errors[-1:]] or ["it said nothing."])[-1]


def _devices(jobs: int, ranks: int) -> list[str | None]:
    """The GPUs of each job, as CUDA_VISIBLE_DEVICES has them; None where there is none. Raises UserError where there are
    fewer than are needed."""
    count = torch.cuda.device_count()
    if count == 0:
        return [None] * jobs
    if count < jobs * ranks:
        raise UserError(
            f"--jobs {jobs} x --ranks {ranks} = {jobs * ranks} GPUs, and {count} are here: use fewer jobs or ranks."
        )
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(i) for i in range(count)]
    return [",".join(names[job * ranks : (job + 1) * ranks]) for job in range(jobs)]


def _refuse_another(point: Point) -> None:
    """Raises UserError where the directory holds a run of other settings."""
    path = point.dir / "config.yaml"
    if not path.exists():
        return
    before = dict(values_of(config_of(point.dir)))
    changed = list(_changes(before, dict(values_of(point.config))))
    if changed:
        raise UserError(
            f"{point.dir} holds a run of other settings: {'; '.join(changed)}. Give another --out, or those settings."
        )


def _changes(before: dict[str, object], now: dict[str, object]) -> Iterator[str]:
    for key, value in now.items():
        if as_text(before.get(key)) != as_text(value) and not key.startswith(_MAY_CHANGE):
            yield f"{key} = {as_text(before.get(key))}, not {as_text(value)}"
