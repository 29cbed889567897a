"""What becomes of a run that something happens to: each fault injected into a run of its own under each launcher, and the
same command given once more. All is done from outside, as an operator, a scheduler or a broken machine would."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from benchmarks.measure import Row
from benchmarks.ports import free_port
from lejepa_scale.checkpoint import Store
from lejepa_scale.checkpoint.saved import Saved
from lejepa_scale.errors import UserError

ROOT = Path(__file__).parents[2]
LAUNCHERS = ("python", "torchrun", "deepspeed")
_BEGUN = 6  # steps that a run has taken when something happens to it
_MORE = 6  # steps that the next start takes
_START_SECONDS, _STOP_SECONDS = 240.0, 150.0
_NO_RANKS = ("torch.distributed.run", "deepspeed.launcher", "multiprocessing")
_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")


@dataclass
class Victim:
    """A run under way, in a session of its own."""

    run: Path
    process: subprocess.Popen[bytes]
    log: Path
    ranks: list[psutil.Process] = field(default_factory=list)

    @property
    def launcher(self) -> psutil.Process:
        return psutil.Process(self.process.pid)

    def tree(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return [self.launcher, *self.launcher.children(recursive=True)]
        return []

    def workers(self) -> list[psutil.Process]:
        """Of the first rank: they hold its environment, and read shards."""
        return [child for child in self.ranks[0].children() if "resource_tracker" not in " ".join(child.cmdline())]


@dataclass(frozen=True)
class Fault:
    """Something that happens to a run. `where` it applies: of LAUNCHERS. before: done to the configuration and the run
    directory."""

    name: str
    inject: Callable[[Victim], None]
    where: Sequence[str] = LAUNCHERS
    overrides: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)


def _at_rank(number: int, name: str) -> Callable[[Victim], None]:
    return lambda victim: victim.ranks[number].send_signal(signal.Signals[name])


def _at_launcher(name: str) -> Callable[[Victim], None]:
    return lambda victim: victim.launcher.send_signal(signal.Signals[name])


def _at_all(name: str) -> Callable[[Victim], None]:
    """As a scheduler does that signals every process of a job."""

    def inject(victim: Victim) -> None:
        for process in victim.tree():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.Signals[name])

    return inject


def _twice(victim: Victim) -> None:
    for _ in range(2):
        victim.launcher.send_signal(signal.SIGTERM)
        time.sleep(0.2)


def _at_worker(name: str) -> Callable[[Victim], None]:
    return lambda victim: victim.workers()[0].send_signal(signal.Signals[name])


def _touch(victim: Victim) -> None:
    (victim.run / "stop").touch()


def _nothing(victim: Victim) -> None:
    pass


def _remove_shards(victim: Victim) -> None:
    shards = victim.run.parent / "shards"
    shards.rename(shards.with_name("shards.gone"))
    # what is open stays open: the worker has to open one anew
    for worker in victim.workers():
        worker.kill()


def _full(victim: Victim) -> None:
    """No file may be made in the folder of checkpoints any more."""
    checkpoints = victim.run / "checkpoints"
    shutil.rmtree(checkpoints, ignore_errors=True)
    checkpoints.write_text("in the way")


_LAUNCHED = ("torchrun", "deepspeed")
FAULTS = (
    *(Fault(f"{name} to the launcher", _at_launcher(name)) for name in _SIGNALS),
    *(Fault(f"{name} to the last rank", _at_rank(-1, name), _LAUNCHED) for name in _SIGNALS),
    *(Fault(f"{name} to every process", _at_all(name)) for name in ("SIGTERM", "SIGINT", "SIGUSR1")),
    Fault("SIGTERM twice", _twice),
    Fault("the file stop", _touch),
    Fault("run.max_hours", _nothing, overrides=["run.max_hours=0.003"]),
    Fault("SIGKILL to the launcher", _at_launcher("SIGKILL")),
    Fault("SIGKILL to the last rank", _at_rank(-1, "SIGKILL"), _LAUNCHED),
    Fault("SIGSTOP to the last rank", _at_rank(-1, "SIGSTOP"), _LAUNCHED, ["engine.timeout_minutes=0.25"]),
    Fault("SIGKILL to a loader worker", _at_worker("SIGKILL")),
    Fault("SIGSTOP to a loader worker", _at_worker("SIGSTOP"), overrides=["data.read_timeout=5"]),
    Fault("the shards are gone", _remove_shards),
    Fault("no checkpoint can be written", _full),
    Fault(
        "W&B's server is not there", _nothing, overrides=["log.wandb.enabled=true", "run.max_hours=0.003"],
        environment={"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40},
    ),
)  # fmt: skip


def inject(launchers: Sequence[str], only: Sequence[str], ranks: int) -> Iterator[Row]:
    """A row for each fault, or those in whose names one of `only` occurs, under each launcher. Raises UserError where a run
    does not begin."""
    if unknown := [name for name in only if all(name not in fault.name for fault in FAULTS)]:
        raise UserError(f"no fault is called {unknown[0]!r}: {'; '.join(fault.name for fault in FAULTS)}.")
    for fault in FAULTS:
        for launcher in launchers:
            if launcher in fault.where and (not only or any(name in fault.name for name in only)):
                with tempfile.TemporaryDirectory() as folder:
                    yield _case(fault, launcher, 1 if launcher == "python" else ranks, Path(folder))


def _case(fault: Fault, launcher: str, ranks: int, folder: Path) -> Row:
    config = _recipe(folder)
    victim = _started(config, launcher, ranks, folder, [*fault.overrides, "train.steps=1000000"], fault.environment)
    try:
        began = time.monotonic()
        fault.inject(victim)
        status = _ended(victim.process, _STOP_SECONDS)
        seconds = time.monotonic() - began
        left = _orphans(victim)
        seconds_of_ranks = time.monotonic() - began
        row: Row = {
            "case": fault.name, "launcher": launcher, "exit": status, "seconds to stop": round(seconds, 1),
            "seconds until all are gone": round(seconds_of_ranks, 1), "left behind": left, "said": _said(victim.log),
        }  # fmt: skip
    finally:
        _kill_all(victim)
    return row | _recovered(config, launcher, ranks, folder, victim.run)


def _recovered(config: Path, launcher: str, ranks: int, folder: Path, run: Path) -> Row:
    """The same command once more, for some steps, with what was in the way taken away."""
    if (shards := folder / "shards.gone").exists():
        shards.rename(folder / "shards")
    if (checkpoints := run / "checkpoints").is_file():
        checkpoints.unlink()
    last, saved = _last_step(run), _saved_step(run)
    began = time.monotonic()
    again = _started(config, launcher, ranks, folder, [f"train.steps={saved + _MORE}"], {}, until=saved + 1)
    recovered = time.monotonic() - began
    status = _ended(again.process, _STOP_SECONDS)
    _kill_all(again)
    audit = subprocess.run(
        [sys.executable, "-m", "lejepa_scale", "audit", str(run)], capture_output=True, text=True, env=_environment({})
    )
    return {
        "steps done again": max(0, last - saved), "seconds to recover": round(recovered, 1), "exit then": status,
        "samples lost or repeated": "0" if audit.returncode == 0 else audit.stdout.strip().splitlines()[-1],
    }  # fmt: skip


def _recipe(folder: Path) -> Path:
    make = ["shards", "make", "synthetic", "--out", str(folder / "shards"), "--count", "400", "--size", "40"]
    command = [sys.executable, "-m", "lejepa_scale", *make]
    subprocess.run(command, check=True, capture_output=True, env=_environment({}))
    tree = {
        "run": {"dir": str(folder / "run")},
        "train": {"steps": 10, "global_batch": 16},
        "engine": {"name": "ddp", "precision": "fp32"},
        "data": {
            "shards": str(folder / "shards"), "workers": 1, "log_keys": True,
            "views": {"global": {"count": 2, "size": 32}, "local": {"count": 0, "size": 16}},
        },
        "model": {"encoder": "resnet10t", "options": {"channels": [8, 8, 8, 8], "stem_width": 8}, "projector": {"dim": 16}},
        "log": {"every": 1},
        "checkpoint": {"every": 50},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def _environment(more: dict[str, str]) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more


def _started(
    config: Path,
    launcher: str,
    ranks: int,
    folder: Path,
    overrides: Sequence[str],
    more: dict[str, str],
    until: int = _BEGUN,
) -> Victim:
    words = {
        "python": ["-m", "lejepa_scale", "train"],
        "torchrun": ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={free_port()}",
                     "-m", "lejepa_scale", "train"],
        "deepspeed": ["-m", "deepspeed.launcher.runner", f"--num_gpus={ranks}", f"--master_port={free_port()}",
                      "--module", "lejepa_scale", "train"],
    }[launcher]  # fmt: skip
    log = folder / f"log{sum(1 for _ in folder.glob('log*'))}"
    engine = ["engine.name=single"] if launcher == "python" else []
    process = subprocess.Popen(
        [sys.executable, *words, "--config", str(config), *engine, *overrides],
        stdout=log.open("wb"), stderr=subprocess.STDOUT, env=_environment(more), start_new_session=True,
    )  # fmt: skip
    victim, deadline = Victim(folder / "run", process, log), time.monotonic() + _START_SECONDS
    began = time.time()
    while _last_step(victim.run, began) < until and process.poll() is None:
        if time.monotonic() > deadline:
            _kill_all(victim)
            raise UserError(f"a run under {launcher} has not begun in {_START_SECONDS:.0f} s: {_said(log)}")
        time.sleep(0.1)
    victim.ranks = _ranks(victim)
    return victim


def _ranks(victim: Victim) -> list[psutil.Process]:
    """In their order: the processes that train, whose children are loader workers."""
    found: dict[int, psutil.Process] = {}
    for process in victim.tree():
        with suppress(psutil.Error):
            words = process.cmdline()
            if "lejepa_scale" in words and not any(one in " ".join(words) for one in _NO_RANKS):
                number = int(process.environ().get("RANK", "0"))
                found.setdefault(number, process)  # a parent comes before its children
    return [found[number] for number in sorted(found)]


def _ended(process: subprocess.Popen[bytes], limit: float) -> int | str:
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"runs on after {limit:.0f} s"


def _orphans(victim: Victim) -> int:
    """Ranks that outlive their launcher for longer than it takes them to notice and to save."""
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline:
        if not (
            living := [rank for rank in victim.ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]
        ):
            return 0
        time.sleep(0.1)
    return len(living)


def _kill_all(victim: Victim) -> None:
    for process in [*victim.tree(), *victim.ranks]:
        with suppress(psutil.Error):
            for child in process.children(recursive=True):
                child.kill()
            process.kill()
    with suppress(subprocess.TimeoutExpired):
        victim.process.wait(10)


def _last_step(run: Path, since: float = 0.0) -> int:
    """That was written; 0 where nothing was since that time."""
    with suppress(OSError, ValueError, IndexError):
        if (run / "metrics.jsonl").stat().st_mtime >= since:
            return int(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    return 0


def _saved_step(run: Path) -> int:
    if not (run / "checkpoints").is_dir():
        return 0
    newest = Store(run, keep=1).latest()
    return 0 if newest is None else Saved(newest).progress.step


def _said(log: Path) -> str:
    """The last line of ours: an error, or how it stopped."""
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    ours = [line.strip() for line in lines if line.startswith(("error", "stopped after"))]
    other = [line.strip() for line in lines if "Error: " in line]
    return (ours or other or [""])[-1][:240]


def as_table(rows: Sequence[Row]) -> str:
    """Markdown."""
    names = [name for name in rows[0] if name != "section"]
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    return "\n".join([*lines, *(f"| {' | '.join(str(row.get(name, '')) for name in names)} |" for row in rows)])
