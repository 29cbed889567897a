"""Where the time of a step goes: a few steps under torch's profiler, a Chrome trace, and what it says of collectives."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch.profiler import record_function

from benchmarks.measure import Row, profiled
from benchmarks.trial import Trial
from lejepa_scale.parallel import process_group

_PROFILED = 3  # steps in a trace


def breakdown(trial: Trial, step: Callable[[], object], trace: Path) -> Iterator[Row]:
    """Phases of a few steps under torch's profiler, which slows what is short; rank 0 writes the Chrome trace."""
    on_zero = process_group.rank() == 0
    trial.phases.read()
    with profiled(trial.device) if on_zero else nullcontext() as profiler:
        for _ in range(_PROFILED):
            with trial.phases("step"), record_function("step"):
                step()
        spent = {name: ms / _PROFILED for name, ms in trial.phases.read().items()}
    if profiler is None:
        return
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    total = spent.pop("step")
    spent["rest"] = total - sum(spent.values())
    for name, ms in spent.items():
        yield {"case": f"profile: {name}", "ms": ms, "share": ms / total}
    for name, us in communication(json.loads(trace.read_text())["traceEvents"]).items():
        ms = us / 1e3 / _PROFILED
        yield {"case": f"profile: {name}", "ms": ms, "share": ms / total}


def communication(events: list[dict[str, Any]]) -> dict[str, float]:
    """Microseconds in which a collective ran, from a trace; on CUDA also those in which no other kernel did."""
    kernels = [e for e in events if e.get("cat") == "kernel"]
    if not kernels:
        return {"communication": _length(_spans(e for e in events if str(e.get("name")).startswith("gloo:")))}
    moving = _spans(e for e in kernels if "nccl" in e["name"].lower())
    working = _spans(e for e in kernels if "nccl" not in e["name"].lower())
    both = _length(moving) + _length(working) - _length(_union([*moving, *working]))
    return {"communication": _length(moving), "communication alone": _length(moving) - both}


def _spans(events: Iterable[dict[str, Any]]) -> list[tuple[float, float]]:
    return _union([(float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in events if "dur" in e])


def _union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for begun, ended in sorted(spans):
        if merged and begun <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(ended, merged[-1][1])
        else:
            merged.append((begun, ended))
    return merged


def _length(spans: list[tuple[float, float]]) -> float:
    return sum(ended - begun for begun, ended in spans)
