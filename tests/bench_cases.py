"""Cases that end in every way, measured as bench.py gpu measures its own: `bench_cases.py KIND FILE MINUTES`."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1] / "tools"))  # a program of its own, not a test
from benchmarks import apart
from benchmarks.apart import Case

Rows = Iterator[dict[str, Any]]


def good(device: torch.device, earlier: Sequence[dict[str, Any]]) -> Rows:
    yield {"case": "a row", "pid": os.getpid(), "earlier": len(earlier), "not a number": float("nan")}


def fails(mended: Path, device: torch.device, earlier: Sequence[dict[str, Any]]) -> Rows:
    yield {"case": "first half", "pid": os.getpid()}
    if not mended.exists():
        raise RuntimeError("gone")
    yield {"case": "second half"}


def dies(device: torch.device, earlier: Sequence[dict[str, Any]]) -> Rows:
    yield {"case": "before", "pid": os.getpid()}
    os.kill(os.getpid(), signal.SIGSEGV)


def spoils(device: torch.device, earlier: Sequence[dict[str, Any]]) -> Rows:
    """As an illegal memory access does: the process can use its device no more."""
    apart.usable = lambda device: False  # type: ignore[assignment]
    yield {"case": "before", "pid": os.getpid()}
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def too_large(device: torch.device, earlier: Sequence[dict[str, Any]]) -> Rows:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")
    yield {}


def hangs(mended: Path, device: torch.device, earlier: Sequence[dict[str, Any]]) -> Rows:
    yield {"case": "before", "pid": os.getpid()}
    if not mended.exists():
        time.sleep(100)


def endless(device: torch.device, earlier: Sequence[dict[str, Any]]) -> Rows:
    while True:
        yield {"case": "one of many", "text": "x" * 100}


def sections(kind: str, mended: Path) -> dict[str, list[Case]]:
    if kind == "failing":
        bad = [Case("fails", partial(fails, mended)), Case("dies", dies), Case("spoils", spoils)]
        more = [Case("too large", too_large), Case("hangs", partial(hangs, mended), limit=2), Case("good", good)]
        return {"first": [Case("late", good, late=True), *bad, *more], "second": [Case("good", good)]}
    if kind == "slow":
        return {
            "first": [Case("good", good), Case("hangs", partial(hangs, mended)), Case("after", good)],
            "second": [Case("good", good)],
        }
    return {"first": [Case("good", good)], "second": [Case("endless", endless)]}


def main(kind: str, file: str, minutes: str) -> None:
    apart.GRACE = 0.5
    path = Path(file)
    apart.run(
        sections(kind, path.with_name("mended")),
        torch.device("cpu"),
        minutes=float(minutes),
        sizes=kind,
        command="bench_cases.py",
        path=path,
        methods=["fork"],  # which a CPU bears, and which needs no imports
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
