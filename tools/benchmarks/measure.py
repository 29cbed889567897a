"""What every benchmark needs: sections run against a deadline, fair timings, peak memory, a description of the machine."""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, TypedDict

import torch

Row = dict[str, Any]
Work = Callable[[], object]


class Results(TypedDict):
    machine: dict[str, str]
    rows: list[Row]


def run_sections(sections: dict[str, Iterator[Row]], device: torch.device, minutes: float) -> Results:
    """Every section in turn, each row printed as it comes; what the time does not reach says so."""
    deadline = time.monotonic() + 60 * minutes
    results = Results(machine=describe(device), rows=[])
    print(", ".join(f"{k} {v}" for k, v in results["machine"].items()), flush=True)
    for name, rows in sections.items():
        while True:
            if time.monotonic() > deadline:
                rows = iter(({"case": "rest of the section", "not measured": "out of time"},))
            try:
                row = next(rows, None)
            except torch.OutOfMemoryError as error:
                row = {"case": "rest of the section", "not measured": str(error).split(". ")[0]}
                rows = iter(())
            if row is None:
                break
            row = {"section": name, **row}
            results["rows"].append(row)
            print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
            if "not measured" in row:
                break
    return results


def describe(device: torch.device) -> dict[str, str]:
    """What the numbers belong to."""
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    out = {"date": time.strftime("%Y-%m-%d"), "device": chip, "python": platform.python_version()}
    if device.type == "cpu":
        out["threads"] = str(torch.get_num_threads())
    for package in ("torch", "timm", "xformers", "deepspeed", "triton"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = "absent"
    return out


def milliseconds(work: Work, device: torch.device, repeats: int) -> float:
    """Median time of one call after three to warm up."""
    return interleaved({"": work}, device, repeats)[""]


def interleaved(works: dict[str, Work], device: torch.device, repeats: int) -> dict[str, float]:
    """Median milliseconds of each, taken in turns, so that a noisy minute falls on all alike; three rounds to warm up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for i in range(3 + repeats):
        for name, work in works.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if i >= 3:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: median(found) for name, found in times.items()}


def peak_bytes(work: Work, device: torch.device) -> int:
    """Most memory allocated at once by `work` above what was held before, by the allocator's own record."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = [e["args"] for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    return max(e["Total Allocated"] for e in events) - (events[0]["Total Allocated"] - events[0]["Bytes"])
