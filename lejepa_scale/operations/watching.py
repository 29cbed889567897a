"""One run on one screen: how far it is, where its curves go, what a step's time goes to on each host, what it said last.
From what its directory holds; asks no process."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from lejepa_scale.checkpoint.metrics import METRICS, read_metrics
from lejepa_scale.operations.runs import SCORES, Standing, spoken, standing
from lejepa_scale.training.monitor import PARTS, RankTimes, read_ranks, stragglers

LOG = "train.log"
_BARS = "▁▂▃▄▅▆▇█"
_COLUMNS, _LINES, _HOSTS = 40, 6, 12  # of a curve; of the log; that are listed
_CURVES = ("loss", "effective_rank", *SCORES)


def screen(run: Path) -> str:
    """The text. Raises UserError where `run` is no run."""
    found, records = standing(run), read_metrics(run / METRICS)
    told = read_ranks(run)
    parts = [_head(found, records), _curves(records)]
    if told is not None:
        step, written, times = told
        parts.append(_times(step, time.time() - written, times))
    parts += [_counts(records), _last_words(run / LOG)]
    return "\n\n".join(part for part in parts if part)


def _head(found: Standing, records: Sequence[dict[str, Any]]) -> str:
    total = int(found.steps) if found.steps.isdigit() else None
    lines = [f"{found.run}: {found.state}" + (f" ({found.where})" if found.where else "")]
    progress = f"step {found.step:,} of {found.steps if total is None else f'{total:,}'}"
    trained = [record for record in records if record.get("loss") is not None]
    if total:
        progress += f" ({found.step / total:.0%})"
        seconds = _seconds_of_step(trained)
        if found.state == "running" and seconds is not None:
            progress += f", {spoken((total - found.step) * seconds)} left"
    if found.images_per_second is not None:
        progress += f"; {found.images_per_second:,.0f} images/s"
    if found.age is not None:
        progress += f"; last record {spoken(found.age)} ago"
    return "\n".join([*lines, progress])


def _seconds_of_step(trained: Sequence[dict[str, Any]]) -> float | None:
    """Of the last record."""
    seconds = trained[-1].get("step_seconds") if trained else None
    return None if seconds is None else float(seconds)


def _curves(records: Sequence[dict[str, Any]]) -> str:
    lines = []
    for name in _CURVES:
        values = [float(record[name]) for record in records if record.get(name) is not None]
        if values:
            lines.append(f"{name.removeprefix('eval_'):<16}{curve(values):<{_COLUMNS}}  {values[-1]:.4g}")
    return "\n".join(lines)


def curve(values: Sequence[float], columns: int = _COLUMNS) -> str:
    """A line of bars from the least value to the largest: means of equal parts, at most `columns` of them."""
    count = min(columns, len(values))
    edges = [len(values) * i // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def _times(step: int, age: float, times: Sequence[RankTimes]) -> str:
    """The largest of each host's ranks, hosts that others wait for first."""
    of_host = defaultdict(list)
    for one in times:
        of_host[one.host].append(one)
    slow = stragglers(times)
    order = [one.host for one in slow]
    hosts = order + [host for host in of_host if host not in order]
    device = any(one.memory for one in times)
    head = ["host", "ranks", "step", *PARTS, *(["GPU GiB"] if device else []), "host GiB"]
    rows = [head]
    for host in hosts[:_HOSTS]:
        here = of_host[host]
        largest = [max(one.parts[part] for one in here) for part in PARTS]
        memory = [f"{max(one.memory for one in here):.1f}"] if device else []
        rows.append(
            [host, _span([one.rank for one in here]), f"{max(one.step for one in here):.3g}"]
            + [f"{value:.3g}" for value in largest]
            + memory
            + [f"{sum(one.host_memory for one in here):.1f}"]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    if len(hosts) > _HOSTS:
        lines.append(f"and {len(hosts) - _HOSTS} more hosts")
    title = f"seconds of a step, the largest of a host's ranks (step {step:,}, {spoken(age)} ago)"
    return "\n".join([title, *lines, *(f"slow: {one}" for one in slow)])


def _span(ranks: Sequence[int]) -> str:
    return f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])


def _counts(records: Sequence[dict[str, Any]]) -> str:
    last: dict[str, Any] = next((record for record in reversed(records) if "skipped_images" in record), {})
    counts = {
        "images replaced": last.get("skipped_images"),
        "steps that came to no numbers": last.get("nonfinite_steps"),
    }
    return "; ".join(f"{count} {name}" for name, count in counts.items() if count)


def _last_words(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 8192))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join([f"{log.name}:", *(f"  {line}" for line in lines[-_LINES:])])
