"""Runs that something happens to: started under a launcher in a session of their own, found in the list of processes, and
ended with all that belongs to them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from benchmarks.ports import free_port
from lejepa_scale.checkpoint import Store
from lejepa_scale.checkpoint.saved import Saved
from lejepa_scale.errors import UserError

ROOT = Path(__file__).parents[3]
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

    def ended(self, limit: float) -> int | str:
        """Its exit status, after at most as many seconds."""
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"runs on after {limit:.0f} s"

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

    def said(self) -> str:
        """The last line of ours: an error, or how it stopped."""
        lines = self.log.read_text(errors="replace").replace("\r", "\n").splitlines()
        ours = [line.strip() for line in lines if line.startswith(("error", "stopped after"))]
        other = [line.strip() for line in lines if "Error: " in line]
        return (ours or other or [""])[-1][:240]


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
            stdout=log.open("wb"), stderr=subprocess.STDOUT, env=environment(more), start_new_session=True,
        )  # fmt: skip
        victim, deadline = Victim(self.folder, process, log, module), time.monotonic() + _START_SECONDS
        began = time.time()
        while last_step(victim.run, began) < until and process.poll() is None:
            if time.monotonic() > deadline:
                victim.kill_all()
                raise UserError(f"a run under {self.launcher} has not begun in {_START_SECONDS:.0f} s: {victim.said()}")
            time.sleep(0.1)
        victim.find_ranks()
        return victim

    def _config(self) -> Path:
        path = self.folder / "config.yaml"
        if not path.exists():
            shutil.copytree(self.shards, self.folder / "shards")
            path.write_text(yaml.safe_dump(_recipe(self.folder)))
        return path


def shards(base: Path) -> Path:
    """400 rendered images."""
    out = base / "shards"
    make = ["shards", "make", "synthetic", "--out", str(out), "--count", "400", "--size", "40"]
    command = [sys.executable, "-m", "lejepa_scale", *make]
    subprocess.run(command, check=True, capture_output=True, env=environment({}))
    return out


def _recipe(folder: Path) -> dict[str, object]:
    return {
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


def environment(more: dict[str, str]) -> dict[str, str]:
    """Of a run."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}"} | more


def last_step(run: Path, since: float = 0.0) -> int:
    """That was written; 0 where nothing was since that time."""
    with suppress(OSError, ValueError, IndexError):
        if (run / "metrics.jsonl").stat().st_mtime >= since:
            return int(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    return 0


def newest(run: Path) -> Path:
    """The newest checkpoint. Raises UserError where there is none."""
    found = Store(run, keep=1).latest() if (run / "checkpoints").is_dir() else None
    if not isinstance(found, Path):
        raise UserError(f"{run} has no checkpoint.")
    return found


def saved_step(run: Path) -> int:
    """Of the newest checkpoint; 0 where there is none."""
    try:
        return Saved(newest(run)).progress.step
    except UserError:
        return 0
