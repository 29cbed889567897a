"""What a checkpoint costs: the share of the steps' time that saving takes, and of large models bytes, seconds and memory."""

from __future__ import annotations

import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from benchmarks.measure import Results, Row, run_sections
from benchmarks.step import Recipe
from benchmarks.trial import Trial
from lejepa_scale.checkpoint import Progress, Saved, Saver, Store, restore
from lejepa_scale.checkpoint.layout import divided
from lejepa_scale.checkpoint.saved import index_text
from lejepa_scale.config import Config, check_world, dump
from lejepa_scale.engine import Average, build_engine
from lejepa_scale.engine.base import MOMENTS, VALUE
from lejepa_scale.model import build
from lejepa_scale.parallel import collectives, launch, process_group

WAYS = ("none", "async", "sync")


def measure(
    recipe: Recipe, every: int, rounds: int, read: Path | None, write: Path | None, out: Path | None, *, plan: bool
) -> Results:
    """On every rank of the launcher's world. Raises UserError."""
    config = recipe.config()
    device = process_group.join(timedelta(minutes=config.engine.timeout_minutes))
    if read is not None:
        sections: dict[str, Iterator[Row]] = {"read": reading(config, device, read)}
    elif plan:
        sections = {"plan": plans(config)}
    elif write is not None:
        sections = {"write": writing(config, device, write)}
    else:
        sections = {
            "stall": stall(config, device, every, rounds, out),
            "average": averaging(config, device),
            "plan": plans(config),
        }
    try:
        return run_sections(sections, device, minutes=1e6)
    finally:
        process_group.leave()


def stall(config: Config, device: torch.device, every: int, rounds: int, out: Path | None) -> Iterator[Row]:
    """`every` steps with a save at their beginning, in turns with as many without, and what a save by itself takes."""
    trial = Trial(config, device)
    folder = collectives.on_rank_zero(lambda: Path(out or tempfile.mkdtemp(prefix="bench-checkpoint-")))
    before = collectives.gather_objects(_peak())
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    begins: dict[str, list[float]] = {way: [] for way in WAYS[1:]}
    whole: dict[str, list[float]] = {way: [] for way in WAYS[1:]}
    savers = {way: Saver(Store(folder / way, keep=1), trial.engine, staged=way == "async") for way in WAYS[1:]}
    try:
        for number in range(rounds):
            for way in WAYS:
                collectives.barrier()
                began = time.perf_counter()
                if way != "none":
                    saver = savers[way]
                    saver.begin(Progress(number + 1, "synthetic"), {}, "run: {}\n")
                    if way == "sync":
                        saver.finish()
                        whole[way].append(time.perf_counter() - began)
                    begins[way].append(time.perf_counter() - began)
                for _ in range(every):
                    trial.step(trial.synthetic())
                    if way == "async" and saver.poll() is not None:
                        whole[way].append(time.perf_counter() - began)
                if way == "async" and saver.in_flight:
                    saver.finish()
                    whole[way].append(time.perf_counter() - began)
                seconds[way].append(time.perf_counter() - began)
        plain = median(seconds["none"])
        path = Store(folder / "sync", keep=1).latest()
        assert path is not None
        size = sum(file.stat().st_size for file in path.iterdir())
        yield {"case": f"{every} steps without a save", "s": plain, "ms a step": 1e3 * plain / every}
        for way in WAYS[1:]:
            yield {
                "case": f"{every} steps with a save, {way}",
                "s": median(seconds[way]),
                "lost %": 100 * (median(seconds[way]) / plain - 1),
                "the step waits s": median(begins[way]),
                "the first s": begins[way][0],
                "complete after s": median(whole[way]),
            }
        after = collectives.gather_objects(_peak())
        yield {
            "case": "a checkpoint",
            "MB": size / 1e6,
            "files": len(list(path.iterdir())),
            "peak MiB of ranks before": [round(x / 2**20) for x in before],
            "after": [round(x / 2**20) for x in after],
        }
    finally:
        if out is None and process_group.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


def averaging(config: Config, device: torch.device) -> Iterator[Row]:
    """What an update of the averaged weights takes, beside a step."""
    trial = Trial(config, device)
    for kind in ("ema", "swa"):
        average, updates, steps = Average(trial.engine, kind), list[float](), list[float]()
        for _ in range(20):
            for seconds, work in ((steps, lambda: trial.step(trial.synthetic())), (updates, average.update)):
                collectives.barrier()
                began = time.perf_counter()
                work()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds.append(time.perf_counter() - began)
        held = sum(shard.data.nbytes for shard in average.shards())
        update, step = median(updates[1:]), median(steps[1:])
        yield {
            "case": f"an update of the average, {kind}",
            "ms": 1e3 * update,
            "ms a step": 1e3 * step,
            "% of ten steps": 10 * update / step,
            "MB of a rank": held / 1e6,
        }
    trial.engine.close()


def writing(config: Config, device: torch.device, folder: Path) -> Iterator[Row]:
    """Random weights and moments of an engine that never took a step, straight from its tensors: for models whose step this
    machine cannot hold."""
    engine = build_engine(config, check_world(config, launch.ranks()), lambda: build(config), device, None)
    engine.prepare_moments(1)
    for shard in list(engine.shards()):
        shard.data.normal_(0, 0.02) if shard.kind == VALUE else shard.data.uniform_(0, 1e-3)
    engine.settle()
    for buffer in engine.buffers().values():  # NaN until they are taken in
        buffer.nan_to_num_()
    collectives.barrier()
    before, began = collectives.gather_objects(_peak()), time.perf_counter()
    saver = Saver(Store(folder, keep=1), engine, staged=False)
    saver.begin(Progress(1, "synthetic"), {}, dump(config))
    path = saver.finish()
    assert isinstance(path, Path)
    spent, after = time.perf_counter() - began, collectives.gather_objects(_peak())
    size = sum(file.stat().st_size for file in path.iterdir())
    yield {
        "case": f"written by {process_group.world_size()} ranks",
        "GB": size / 1e9,
        "s": spent,
        "peak MiB of ranks before": [round(x / 2**20) for x in before],
        "after": [round(x / 2**20) for x in after],
    }
    if config.engine.name == "fsdp":
        yield _by_torch(engine, folder / "dcp")
    engine.close()


def _by_torch(engine: Any, folder: Path) -> Row:
    """The same state by torch.distributed.checkpoint's own writer, which syncs its files too."""
    state = {
        "model": get_model_state_dict(engine.module),
        "optim": get_optimizer_state_dict(engine.module, engine.optimizer),
    }
    collectives.barrier()
    before, began = collectives.gather_objects(_peak()), time.perf_counter()
    dcp.save(state, checkpoint_id=folder)
    spent, after = time.perf_counter() - began, collectives.gather_objects(_peak())
    size = sum(file.stat().st_size for file in folder.iterdir())
    collectives.barrier()
    return {
        "case": "written by torch.distributed.checkpoint.save",
        "GB": size / 1e9,
        "s": spent,
        "peak MiB of ranks before": [round(x / 2**20) for x in before],
        "after": [round(x / 2**20) for x in after],
    }


def reading(config: Config, device: torch.device, path: Path) -> Iterator[Row]:
    """A checkpoint into a new engine."""
    engine = build_engine(config, check_world(config, launch.ranks()), lambda: build(config), device, None)
    collectives.barrier()
    before, began = collectives.gather_objects(_peak()), time.perf_counter()
    saved = Saved(path)
    restore(saved, engine)
    collectives.barrier()
    spent, after = time.perf_counter() - began, collectives.gather_objects(_peak())
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    yield {
        "case": f"written by {saved.ranks} ranks, read by {process_group.world_size()}",
        "GB": size / 1e9,
        "s": spent,
        "peak MiB of ranks before": [round(x / 2**20) for x in before],
        "after": [round(x / 2**20) for x in after],
    }
    engine.close()


def plans(config: Config) -> Iterator[Row]:
    """Who writes what, for ranks that are not here: FSDP's cut of every parameter into rows."""
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in build(config).named_parameters()}
    elements = sum(map(prod, shapes.values()))
    for ranks in (64, 512):
        held = np.zeros((ranks, len(shapes), 2), np.int64)
        for column, shape in enumerate(shapes.values()):
            rows, row = (shape[0], prod(shape[1:])) if shape else (1, 1)
            each = -(-rows // ranks)
            first = np.minimum(rows, each * np.arange(ranks))
            held[:, column, 0], held[:, column, 1] = first * row, (np.minimum(rows, first + each) - first) * row
        began = time.perf_counter()
        layout = divided(shapes, held)
        text = index_text(layout, {}, [VALUE, *MOMENTS])
        spent = time.perf_counter() - began
        largest = max(12 * sum(part.length for part in layout.of_rank(rank).values()) for rank in range(0, ranks, 7))
        yield {
            "case": f"{elements / 1e9:.3g} B parameters on {ranks} ranks",
            "GB": 12 * elements / 1e9,
            "GB of the largest rank": largest / 1e9,
            "files": 2 * ranks + 5,
            "index MB": len(text) / 1e6,
            "plan s": spent,
            "s at 1 GB/s a rank": largest / 1e9,
            "s at 20 GB/s in all": 12 * elements / 20e9,
        }


def _peak() -> int:
    """Bytes of resident memory, at most so far."""
    unit: Any = 1024 if sys.platform == "linux" else 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
