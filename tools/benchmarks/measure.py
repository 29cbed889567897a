"""What every benchmark needs: sections run against a deadline, fair timings, peak memory, a description of the machine."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, TypedDict

import torch
from torch import Tensor

from lejepa_scale.errors import UserError
from lejepa_scale.parallel import process_group

WARM = 3  # rounds of a timing that do not count
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
            except Exception as error:  # the other sections are worth their time; other ranks would wait for this one
                if isinstance(error, UserError) or process_group.world_size() > 1:
                    raise
                traceback.print_exc()
                row = {"case": "rest of the section", "ok": False, "failure": f"{type(error).__name__}: {error}"}
                rows = iter(())
            if row is None:
                break
            row = {"section": name, **row}
            results["rows"].append(row)
            print(line(row), flush=True)
            if "not measured" in row:
                break
    return results


def line(row: Row) -> str:
    """A row as it is printed."""
    return "  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())


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
    for i in range(WARM + repeats):
        for name, work in works.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if i >= WARM:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: median(found) for name, found in times.items()}


def peak_bytes(work: Work, device: torch.device) -> int:
    """Most memory allocated at once by `work` above what was held before, by the allocator's own record."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profiled(device, profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        traced = json.loads(trace.read_text())["traceEvents"]
    found = sorted(
        (e for e in traced if e.get("name") == "[memory]"), key=lambda e: e["ts"]
    )  # written thread by thread
    events = [e["args"] for e in found]
    return max(e["Total Allocated"] for e in events) - (events[0]["Total Allocated"] - events[0]["Bytes"])


@contextmanager
def profiled(device: torch.device, *, profile_memory: bool = False) -> Iterator[torch.profiler.profile]:
    """torch's profiler for the host and the device, without its lines on stderr about every start and absent GPUs."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when the process profiles for the first time
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=profile_memory) as profiler:
        yield profiler


def matrix_product(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> tuple[Work, int]:
    """Products of two square matrices, of a few sizes the one with the highest rate, and their FLOPs: what a step could
    reach here at most, to be timed in turns with it. Several on a GPU, where one alone was seen to take 1.4 times as long
    right after a step as a moment later."""
    found: dict[float, tuple[Work, int]] = {}
    sides, times = ((4096, 8192), 10) if device.type == "cuda" else ((768, 1536), 1)
    for side in sides:
        a, b = torch.randn(2, side, side, device=device).to(dtype)
        work, flops = partial(_products, a, b, times), times * 2 * side**3
        found[flops / milliseconds(work, device, repeats)] = work, flops
    return found[max(found)]


def _products(a: Tensor, b: Tensor, times: int) -> None:
    for _ in range(times):
        a @ b


def matmul_flops(device: torch.device, dtype: torch.dtype, repeats: int = 7) -> float:
    """FLOP/s of the best matrix product, a median."""
    work, flops = matrix_product(device, dtype)
    return 1e3 * flops / milliseconds(work, device, repeats)
