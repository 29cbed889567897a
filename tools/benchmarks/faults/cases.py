"""What can happen to a run, and how it is made to happen from outside, as an operator, a scheduler or a broken machine
would."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.faults.small_run import newest
from benchmarks.faults.victims import BEGUN, LAUNCHERS, Victim
from lejepa_scale.errors import UserError

_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
_LAUNCHED = ("torchrun", "deepspeed")
_BROKEN = "benchmarks.faults.broken"  # what trains in place of lejepa_scale where a part is to break inside
_DISK_BYTES = 400 << 20


@dataclass(frozen=True)
class Fault:
    """Something that happens to a run. `where` it applies: of LAUNCHERS. overrides: of the first start. settings: of both.
    around: entered with the case's folder before the run is started. mend: takes away what is in the way, before the next
    start. holds: what has to be so after it, beside what holds of every case. environment: values may hold {folder}, the
    case's. until: steps that the run has taken by then."""

    name: str
    inject: Callable[[Victim], None]
    where: Sequence[str] = LAUNCHERS
    overrides: Sequence[str] = ()
    settings: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    mend: Callable[[Victim], None] = lambda victim: None
    holds: Callable[[Victim], bool] = lambda victim: True
    around: Callable[[Path], AbstractContextManager[None]] = lambda folder: nullcontext()
    module: str = "lejepa_scale"
    until: int = BEGUN


def _nothing(victim: Victim) -> None:
    pass


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


def _at_worker(name: str) -> Callable[[Victim], None]:
    return lambda victim: victim.workers()[0].send_signal(signal.Signals[name])


def _twice(victim: Victim) -> None:
    for _ in range(2):
        victim.launcher.send_signal(signal.SIGTERM)
        time.sleep(0.2)


def _touch_stop(victim: Victim) -> None:
    (victim.run / "stop").touch()


def _remove_shards(victim: Victim) -> None:
    shards = victim.folder / "shards"
    shards.rename(shards.with_name("shards.gone"))
    # what is open stays open: the worker has to open one anew
    for worker in victim.workers():
        worker.kill()


def _bring_shards_back(victim: Victim) -> None:
    (victim.folder / "shards.gone").rename(victim.folder / "shards")


def _bar_checkpoints(victim: Victim) -> None:
    """No file may be made in the folder of checkpoints any more."""
    checkpoints = victim.run / "checkpoints"
    shutil.rmtree(checkpoints, ignore_errors=True)
    checkpoints.write_text("in the way")


@contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    """A file system of its own for run.dir."""
    (run := folder / "run").mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(run)]
    if (done := subprocess.run(command, capture_output=True, text=True)).returncode:
        raise UserError(f"a disk that fills has to be mounted, as root: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(run)], check=False)


def _fill(victim: Victim) -> None:
    with suppress(OSError), (victim.run / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def _kill_and_damage(victim: Victim) -> None:
    """Every process, and the newest checkpoint is left with a file that is half as long."""
    _at_all("SIGKILL")(victim)
    victim.process.wait(30)
    files = [path for path in newest(victim.run).rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def _kill_a_host(victim: Victim) -> None:
    """Every process, whose lock of run.dir is that of another machine."""
    _at_all("SIGKILL")(victim)
    victim.process.wait(30)
    lock = victim.run / "lock"
    lock.write_text(json.dumps(json.loads(lock.read_text()) | {"host": "gone"}))


def _kill_in_a_build(victim: Victim) -> None:
    """Every process, and the lock of a C++ build is left, an hour old."""
    _at_all("SIGKILL")(victim)
    victim.process.wait(30)
    (build := victim.folder / "extensions" / "cpu_adam").mkdir(parents=True)
    (lock := build / "lock").touch()
    for path in (lock, build):
        os.utime(path, (time.time() - 3600,) * 2)


def _no_lock(victim: Victim) -> bool:
    return not (victim.folder / "extensions/cpu_adam/lock").exists()


def _begin_to_break(victim: Victim) -> None:
    (victim.folder / "broken").touch()


def _end_breaking(victim: Victim) -> None:
    (victim.folder / "broken").unlink()


def _breaks(part: str) -> dict[str, str]:
    return {"FAULT": part, "FAULT_FILE": "{folder}/broken"}


FAULTS = (
    *(Fault(f"{name} to the launcher", _at_launcher(name)) for name in _SIGNALS),
    *(Fault(f"{name} to the last rank", _at_rank(-1, name), _LAUNCHED) for name in _SIGNALS),
    *(Fault(f"{name} to every process", _at_all(name)) for name in ("SIGTERM", "SIGINT", "SIGUSR1")),
    Fault("SIGTERM twice", _twice),
    Fault("the file stop", _touch_stop),
    Fault("run.max_hours", _nothing, overrides=["run.max_hours=0.003"]),
    Fault("SIGKILL to the launcher", _at_launcher("SIGKILL")),
    Fault("SIGKILL to every process", _at_all("SIGKILL")),
    Fault("SIGKILL to the last rank", _at_rank(-1, "SIGKILL"), _LAUNCHED),
    Fault("SIGSTOP to the last rank", _at_rank(-1, "SIGSTOP"), _LAUNCHED, ["engine.timeout_minutes=0.25"]),
    Fault("SIGKILL to a loader worker", _at_worker("SIGKILL")),
    Fault("SIGSTOP to a loader worker", _at_worker("SIGSTOP"), overrides=["data.read_timeout=5"]),
    Fault("the shards are gone", _remove_shards, mend=_bring_shards_back),
    Fault("no checkpoint can be written", _bar_checkpoints, mend=lambda victim: (victim.run / "checkpoints").unlink()),
    Fault(
        "the disk is full", _fill, overrides=["checkpoint.every=10"], around=_small_disk,
        mend=lambda victim: (victim.run / "filler").unlink(),
    ),
    Fault("the newest checkpoint is damaged", _kill_and_damage, overrides=["checkpoint.every=3"], until=10),
    Fault("the lock of a host that is gone", _kill_a_host),
    Fault(
        "the lock of a build that was killed", _kill_in_a_build, _LAUNCHED, settings=["engine.name=zero1"], holds=_no_lock,
        environment={"TORCH_EXTENSIONS_DIR": "{folder}/extensions"},
    ),
    Fault(
        "the clock goes back an hour", _begin_to_break, overrides=["run.max_hours=0.006"],
        environment=_breaks("clock"), module=_BROKEN, mend=_end_breaking,
    ),
    Fault(
        "batches of the last rank are NaN", _begin_to_break, environment=_breaks("nan"), module=_BROKEN, mend=_end_breaking,
    ),
    Fault(
        "W&B's server is not there", _nothing, overrides=["log.wandb.enabled=true", "run.max_hours=0.003"],
        environment={"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40},
    ),
)  # fmt: skip
