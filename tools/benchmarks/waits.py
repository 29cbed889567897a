"""The trainer's own loop on CUDA tensors that hold nothing: where its host would wait for the device, and how many kernels
each phase of a step launches. On any machine, in seconds, for models of any size."""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarks.fake_cuda import CUDA, Launch, Watch, group_of_nobody, let_backward_run, pretended
from benchmarks.measure import Results, Row, run_sections
from benchmarks.trial import Recipe
from lejepa_scale.checkpoint import Progress
from lejepa_scale.config import BatchPlan, Config, check_world
from lejepa_scale.data import Batch
from lejepa_scale.data.audit.keylog import Record
from lejepa_scale.data.images import photometric, photometric_triton
from lejepa_scale.data.images.pixels import Pixels
from lejepa_scale.engine import Engine, build_engine, fsdp
from lejepa_scale.model import build
from lejepa_scale.training import actions, loop
from lejepa_scale.training.feed import Feed
from lejepa_scale.training.guard import Guard
from lejepa_scale.training.monitor import Monitor, Phases
from lejepa_scale.training.probe import OnlineProbe
from lejepa_scale.training.run import Run
from lejepa_scale.training.start import start_engine

PHASES = ("colours", "forward", "backward", "optimizer", "probe", "between")


@dataclass(frozen=True)
class Step:
    """Of one step: where the host waits, and what the device is given to do."""

    waits: list[str]
    work: list[Launch]

    @property
    def launches(self) -> Counter[str]:
        """Operators by phase."""
        return Counter(launch.phase for launch in self.work)


class _Batches:
    """As the loader hands them over: in page-locked memory, parameters of the colours on the host."""

    def __init__(self, config: Config, micro_batch: int) -> None:
        views = config.data.views
        self.groups = [group for group in (views.global_, views.local) if group.count]
        self.channels, self.count = config.data.channels, micro_batch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        n = self.count
        views = [
            torch.zeros(g.count, n, self.channels, g.size, g.size, dtype=torch.uint8).pin_memory() for g in self.groups
        ]
        parameters = [torch.zeros(g.count, n, photometric.WIDTH) for g in self.groups]
        labels = torch.zeros(n, dtype=torch.long).pin_memory()
        return Batch(views, parameters, labels, ["key"] * n, [], [Record(0, 0, 0, 0, 0, "shard/key")] * n)


def steps(config: Config) -> list[Step]:
    """Every step of a run of `config.train.steps`. Changes the process for its life."""
    with tempfile.TemporaryDirectory() as folder:
        let_backward_run(Path(folder))
    plan, found = check_world(config, 1), list[Step]()
    drawn = _drawn(config, plan)
    with torch.device("meta"):  # timm computes them by tensors, which will hold nothing
        rates = [getattr(block, "drop_path", None) for block in build(config).encoder.blocks]

    def colours(images: Tensor, _: Tensor, pixels: Pixels) -> Tensor:
        if images.shape[1] == 3:
            return _coloured(images, drawn[len(images)], pixels)
        return photometric._together(images, drawn[len(images)], pixels)

    with ExitStack() as stack:
        stack.enter_context(patch.object(photometric, "apply", colours))
        mesh = group_of_nobody()
        stack.enter_context(patch.object(fsdp, "mesh_of", lambda *_: mesh))
        stack.enter_context(patch.object(Monitor, "_memory", lambda self: 0.0))  # of a device that is not there
        watch = stack.enter_context(pretended())
        engine = build_engine(config, plan, lambda: build(config), CUDA)
        for block, rate in zip(engine.module.encoder.blocks, rates, strict=True):
            block.drop_path = rate  # type: ignore[assignment]
        run, after_step = _run(config, plan, engine)
        for owner, name, phase in (
            (run.engine, "forward", "forward"),
            (run.engine, "backward", "backward"),
            (run.engine, "step", "optimizer"),
            (run.probe, "step", "probe"),
            (Batch, "augmented", "colours"),
        ):
            stack.enter_context(patch.object(owner, name, _told(watch, phase, getattr(owner, name))))
        watch.phase = "between"

        def mark(run: Run, result: object) -> None:
            found.append(Step(watch.waits[:], watch.launches[:]))
            watch.waits.clear()
            watch.launches.clear()

        loop.loop(run, [*after_step, mark])
    return found


def _coloured(images: Tensor, parameters: Any, pixels: Pixels) -> Tensor:
    """As `photometric_triton.fused`: what it sends, and for each kernel what it writes."""
    count, _, height, width = images.shape
    table = photometric._sent(photometric_triton._table(parameters, pixels, photometric._RADIUS), images.device)
    table.new_zeros(count, photometric_triton._PARTS)
    if blurred := int((parameters[:, photometric.SIGMA] > 0).sum()):
        table.new_zeros(blurred, 3, height, width)
    return table.new_zeros(count, 3, height, width)


def _told(watch: Watch, phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        before, watch.phase = watch.phase, phase
        try:
            return method(*args, **kwargs)
        finally:
            watch.phase = before

    return called


def on_a_gpu(config: Config, device: torch.device) -> list[list[str]]:
    """Of every step of a run on a real device (CUDA), what torch itself finds that the host waits for."""
    plan, found = check_world(config, 1), list[list[str]]()
    run, after_step = _run(config, plan, start_engine(config, plan, device))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")

        def mark(run: Run, result: object) -> None:
            found.append(
                [f"{Path(w.filename).name}:{w.lineno}" for w in told if "synchronizing CUDA" in str(w.message)]
            )
            told.clear()

        torch.cuda.set_sync_debug_mode("warn")
        try:
            loop.loop(run, [*after_step, mark])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    run.engine.close()
    return found


def _run(config: Config, plan: BatchPlan, engine: Engine) -> tuple[Run, list[Any]]:
    device = engine.device
    feed = Feed(iter(_Batches(config, plan.micro_batch)), plan, device, beside=False)  # as a second stream would do it
    probe = OnlineProbe(engine.module.encoder.embed_dim, 10, 1e-3, 0, device)
    run = Run(config, plan, device, engine, feed, Progress(0, "shards"), probe)
    reporter: Any = SimpleNamespace(advance=lambda: None, log=lambda record: record)
    request: Any = SimpleNamespace(reason=str)
    of_probe = actions.Probe(device)
    monitor = Monitor(config.run.dir, Phases(lambda name, *, unlimited: nullcontext()), device)
    report = actions.Report(run, reporter, monitor, [of_probe.reading])
    return run, [actions.quarantine, actions.Stop(request), of_probe, Guard(), report]


def _drawn(config: Config, plan: BatchPlan) -> dict[int, Any]:
    """Parameters of the colours of so many views, which decide on the host what is launched."""
    draws = np.random.default_rng(0)
    counts = [group.count * plan.micro_batch for group in (config.data.views.global_, config.data.views.local)]
    return {n: photometric.draw(draws.random((n, photometric.DRAWS)), config.data.augment) for n in counts}


def measure(recipe: Recipe) -> Results:
    """A row for the recipe's step, and one for each place where the host waits."""
    return run_sections({"waits": _rows(recipe.config())}, torch.device("cpu"), minutes=60)


def _rows(config: Config) -> Iterator[Row]:
    _, *middle, _ = steps(config)  # the first makes what is kept, the last is read at once
    waits = Counter(line for step in middle for line in step.waits)
    launches = {phase: middle[0].launches[phase] for phase in PHASES}
    case = f"{config.model.encoder}, {check_world(config, 1).micro_batch} images"
    yield {
        "case": case,
        "waits a step": sum(waits.values()) / len(middle),
        "launches": sum(launches.values()),
        **launches,
    }
    for line, count in waits.items():
        yield {"case": "a wait", "ok": False, "a step": count / len(middle), "where": line}
