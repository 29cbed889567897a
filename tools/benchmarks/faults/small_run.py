"""A run of a small encoder, for benchmarks that do something to it: its images and configuration, and what is read of it
from outside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import yaml

from lejepa_scale.checkpoint import Store
from lejepa_scale.checkpoint.saved import Saved, verify
from lejepa_scale.errors import UserError

ROOT = Path(__file__).parents[3]


def shards(base: Path) -> Path:
    """400 rendered images."""
    out = base / "shards"
    make = ["shards", "make", "synthetic", "--out", str(out), "--count", "400", "--size", "40"]
    command = [sys.executable, "-m", "lejepa_scale", *make]
    subprocess.run(command, check=True, capture_output=True, env=environment({}))
    return out


def recipe(folder: Path, images: Path) -> Path:
    """A configuration in `folder`, whose shards are a copy there of `images`."""
    shutil.copytree(images, folder / "shards")
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
    (path := folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return path


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
    """Of the newest checkpoint that is whole; 0 where there is none."""
    for path in reversed(Store(run, keep=1).complete() if (run / "checkpoints").is_dir() else []):
        with suppress(UserError):
            verify(path)
            return Saved(path).progress.step
    return 0


def ended(process: subprocess.Popen[bytes], limit: float) -> int | str:
    """The exit status, after at most as many seconds."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"runs on after {limit:g} s"


def said(log: Path) -> str:
    """The last line of ours: an error, or how it stopped."""
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    ours = [line.strip() for line in lines if line.startswith(("error", "stopped after"))]
    other = [line.strip() for line in lines if "Error: " in line]
    return (ours or other or [""])[-1][:240]


def audited(run: Path) -> str:
    """Samples that were lost or repeated: 0, or what `lejepa audit` says."""
    words = [sys.executable, "-m", "lejepa_scale", "audit", str(run)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment({}))
    if done.returncode == 0:
        return "0"
    return (done.stdout.splitlines() or done.stderr.splitlines() or ["it says nothing"])[-1]
