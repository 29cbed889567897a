"""Runs that something happens to: started under a launcher in a session of their own, found in the list of processes, and
ended with all that belongs to them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.faults import small_run
from benchmarks.ports import free_port
from lejepa_scale.errors import UserError

LAUNCHERS = ("python", "torchrun", "deepspeed")
BEGUN = 6  # steps that a run has taken when something happens to it
_START_SECONDS, _ORPHAN_SECONDS = 240.0, 40.0
_NO_RANKS = ("torch.distributed.run", "deepspeed.launcher", "multiprocessing")


@dataclass
class Victim:
    """A run under way, in a session of its own."""

    folder: Path
    process: subprocess.Popen[bytes]
    log: Path
    module: str
    ranks: list[psutil.Process] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.folder / "run"

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

    def find_ranks(self) -> None:
        """In their order: the processes that train, whose children are loader workers."""
        found: dict[int, psutil.Process] = {}
        for process in self.tree():
            with suppress(psutil.Error):
                words = process.cmdline()
                if self.module in words and not any(one in " ".join(words) for one in _NO_RANKS):
                    number = int(process.environ().get("RANK", "0"))
                    found.setdefault(number, process)  # a parent comes before its children
        self.ranks = [found[number] for number in sorted(found)]

    def orphans(self) -> int:
        """Ranks that outlive their launcher for longer than it takes them to notice and to save."""
        deadline = time.monotonic() + _ORPHAN_SECONDS
        while time.monotonic() < deadline:
            living = [rank for rank in self.ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]
            if not living:
                return 0
            time.sleep(0.1)
        return len(living)

    def kill_all(self) -> None:
        for process in [*self.tree(), *self.ranks]:
            with suppress(psutil.Error):
                for child in process.children(recursive=True):
                    child.kill()
                process.kill()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(10)


@dataclass(frozen=True)
class Command:
    """A run of a small encoder on a copy of `shards`, in a folder of its own."""

    launcher: str
    ranks: int
    folder: Path
    shards: Path

    def started(
        self, overrides: Sequence[str], more: dict[str, str], until: int, module: str = "lejepa_scale"
    ) -> Victim:
        """Once it has taken as many steps. Raises UserError where it does not."""
        words = {
            "python": ["-m", module, "train"],
            "torchrun": ["-m", "torch.distributed.run", f"--nproc-per-node={self.ranks}", f"--master-port={free_port()}",
                         "-m", module, "train"],
            "deepspeed": ["-m", "deepspeed.launcher.runner", f"--num_gpus={self.ranks}", f"--master_port={free_port()}",
                          "--module", module, "train"],
        }[self.launcher]  # fmt: skip
        log = self.folder / f"log{sum(1 for _ in self.folder.glob('log*'))}"
        engine = ["engine.name=single"] if self.launcher == "python" else []
        process = subprocess.Popen(
            [sys.executable, *words, "--config", str(self._config()), *engine, *overrides],
            stdout=log.open("wb"), stderr=subprocess.STDOUT, env=small_run.environment(more), start_new_session=True,
        )  # fmt: skip
        victim, deadline = Victim(self.folder, process, log, module), time.monotonic() + _START_SECONDS
        began = time.time()
        while small_run.last_step(victim.run, began) < until and process.poll() is None:
            if time.monotonic() > deadline:
                victim.kill_all()
                raise UserError(
                    f"a run under {self.launcher} has not begun in {_START_SECONDS:.0f} s: {small_run.said(log)}"
                )
            time.sleep(0.1)
        victim.find_ranks()
        return victim

    def _config(self) -> Path:
        path = self.folder / "config.yaml"
        return path if path.exists() else small_run.recipe(self.folder, self.shards)
