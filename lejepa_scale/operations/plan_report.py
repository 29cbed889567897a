"""A plan in words and columns, and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lejepa_scale.config import Config
from lejepa_scale.config.durations import length_of
from lejepa_scale.cost.forecast import FASTEST, HIDDEN, LINK_SHARE, MEMORY_SHARE, PASSES, PASSES_COMPILED, SLOWEST
from lejepa_scale.cost.machines import GPUS_OF_A_HOST
from lejepa_scale.operations.planning import Advice, Assumptions, Plan

Row = dict[str, Any]


def report(name: str, config: Config, plan: Plan, assumed: Assumptions, suggestions: Sequence[Advice]) -> str:
    """All of it in words and columns."""
    machine, batches = assumed.machine, plan.batches
    where = f"{plan.hosts} host{'s' * (plan.hosts > 1)}" if batches.ranks > 1 else "one host"
    head = (
        f"{name} on {batches.ranks} x {machine.chip} ({where}), {config.engine.name} {config.engine.precision}: "
        f"{'fits' if plan.fits else 'DOES NOT FIT'}\n"
        f"batch {batches.global_batch:,} = {batches.micro_batch} x {batches.ranks} ranks x {batches.accumulation}; the "
        f"regularizer sees {plan.statistic:,} images at once"
    )
    parts = [head, _memory_lines(plan), _step_lines(plan), _traffic_lines(plan), _run_lines(config, plan, assumed)]
    if suggestions:
        parts.append(_advice_lines(plan, suggestions))
    elif not plan.fits:
        parts.append(
            "nothing that this knows makes it fit on so many GPUs (micro-batch 1, full recomputation, fsdp, offloading): "
            "use more of them, or a smaller encoder or smaller views."
        )
    parts.append(_assumed_lines(config, assumed))
    return "\n\n".join(parts)


def _memory_lines(plan: Plan) -> str:
    names = ("parameters", "gradients", "moments", "gathered", "buckets", "inputs", "activations", "working", "update")
    held = [(name, getattr(plan.memory, name) / 2**30) for name in names]
    lines = [f"memory of a rank   {_gib(plan.memory.total)} GiB of {_gib(plan.usable)} that tensors can have"]
    lines.append("  " + ", ".join(f"{name} {size:.2f}" for name, size in held if size >= 0.005) + "; not all at once")
    if plan.memory.host:
        lines.append(f"  on the host {_gib(plan.memory.host)} GiB a rank")
    return "\n".join(lines)


def _step_lines(plan: Plan) -> str:
    found = plan.forecast
    return (
        f"a step             {_seconds(found.seconds)} (expected between {_seconds(found.fastest)} and "
        f"{_seconds(found.slowest)}); MFU {found.mfu():.0%} ({found.mfu(found.slowest):.0%} to "
        f"{found.mfu(found.fastest):.0%})\n"
        f"  products {_seconds(found.products)}, attention {_seconds(found.attention)}, through memory "
        f"{_seconds(found.memory)}, update {_seconds(found.update)}, network {_seconds(found.network)}, of which "
        f"{_seconds(found.waited)} are waited for"
    )


def _traffic_lines(plan: Plan) -> str:
    if not plan.traffic:
        return "traffic            none: one rank"
    lines = [f"traffic of a rank  {_bytes(sum(one.sent for one in plan.traffic))} sent a step"]
    for one in sorted(plan.traffic, key=lambda one: -one.sent):
        link = "inside the host" if one.near and one.ranks <= GPUS_OF_A_HOST else "between hosts"
        lines.append(
            f"  {one.what:<21}{one.collective:<15}{one.calls:>6,.0f} calls  {_bytes(one.sent):>9}  {one.ranks:,} ranks, "
            f"{link}{'' if one.beside else '; waited for'}"
        )
    return "\n".join(lines)


def _run_lines(config: Config, plan: Plan, assumed: Assumptions) -> str:
    ranks, per_gpu = plan.batches.ranks, plan.images_per_second / plan.batches.ranks
    length = length_of(config)[1]
    hours = (
        f"{length}: tell the data's size (--samples) for hours"
        if plan.hours is None
        else f"{length}: {plan.hours:,.3g} h, {ranks * plan.hours:,.0f} GPU-hours"
    )
    cores = per_gpu / assumed.images_per_core
    writing = plan.checkpoint / (plan.hosts * assumed.bytes_per_second)
    every = ""
    if isinstance(config.checkpoint.every, int):
        between = config.checkpoint.every * plan.forecast.seconds
        every = f"; one every {config.checkpoint.every:,} steps, {_seconds(between)}"
    return (
        f"the run            {hours}\n"
        f"the loader         {plan.images_per_second:,.0f} images/s, {per_gpu:,.1f} a GPU: {cores:.2g} cores for each (at "
        f"{assumed.images_per_core:,.0f} images/s a core)\n"
        f"a checkpoint       {_bytes(plan.checkpoint)}, {_bytes(plan.checkpoint / ranks)} a rank: {_seconds(writing)} to "
        f"write (at {_bytes(assumed.bytes_per_second)}/s a host){every}"
    )


def _advice_lines(plan: Plan, suggestions: Sequence[Advice]) -> str:
    lines = ["faster, and fits:" if plan.fits else "what fits, the fastest first:"]
    for one in suggestions:
        other = one.plan
        seen = "" if other.statistic == plan.statistic else f"; the regularizer sees {other.statistic:,} images at once"
        lines.append(
            f"  {' '.join(one.overrides)}\n    {_gib(other.memory.total)} GiB, {_seconds(other.forecast.seconds)} a step"
            f"{f', {_gib(other.memory.host)} GiB of the host' if other.memory.host else ''}{seen}"
        )
    return "\n".join(lines)


def _assumed_lines(config: Config, assumed: Assumptions) -> str:
    machine = assumed.machine
    passes = PASSES_COMPILED if config.engine.compile else PASSES
    return (
        f"Assumed ({machine.sources}): products at {machine.product:.0%} of {machine.peak / 1e12:,.0f} TFLOP/s, attention "
        f"at {machine.attention:.0%}; {passes} passes of {machine.bandwidth / 1e12:.2f} TB/s x {MEMORY_SHARE:.0%} over what "
        f"a forward pass keeps; links of {machine.inside / 1e9:.0f} GB/s inside a host and {machine.outside / 1e9:.0f} GB/s "
        f"a GPU between hosts, x {LINK_SHARE:.0%}; collectives beside {HIDDEN:.0%} of the passes. The range: all of it "
        f"{FASTEST:g} times as good and everything hidden, to {SLOWEST:g} times and nothing hidden. Evaluations, saving, "
        "and waiting for images are not in it. Measured beside forecast: docs/benchmarks.md."
    )


def as_json(config: Config, plan: Plan, suggestions: Sequence[Advice]) -> dict[str, Any]:
    """The same for programs: bytes and seconds."""
    found = plan.forecast
    return {
        "fits": plan.fits,
        "usable bytes": plan.usable,
        "memory": asdict(plan.memory) | {"total": plan.memory.total},
        "traffic": [asdict(one) | {"sent": one.sent} for one in plan.traffic],
        "step": asdict(found) | {"mfu": found.mfu()},
        "images_per_second": plan.images_per_second,
        "hours": plan.hours,
        "checkpoint bytes": plan.checkpoint,
        "images of the statistic": plan.statistic,
        "advice": [
            {"overrides": one.overrides, "bytes": one.plan.memory.total, "seconds": one.plan.forecast.seconds}
            for one in suggestions
        ],
    }


def as_table(rows: Sequence[Row]) -> str:
    """Columns of a width, right-aligned, in the order in which the rows first have them; what a row lacks is a dash."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *(["-" if row.get(name) is None else str(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in cells)


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}"


def _bytes(size: float) -> str:
    for unit, of in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= of:
            return f"{size / of:.3g} {unit}"
    return f"{size:.0f} B"


def _seconds(seconds: float) -> str:
    if seconds >= 7200:
        return f"{seconds / 3600:.3g} h"
    if seconds >= 120:
        return f"{seconds / 60:.3g} min"
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms"
