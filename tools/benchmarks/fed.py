"""Steps on images: the loader alone, and from shards to updated weights, as the trainer goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.measure import WARM, Row
from benchmarks.rates import collective_rows, memory, rates
from benchmarks.trace import breakdown
from benchmarks.trial import Trial
from lejepa_scale.config import Config, check_world
from lejepa_scale.data import Batch, Loader
from lejepa_scale.data.mixture import Mixture
from lejepa_scale.parallel import collectives, launch, process_group
from lejepa_scale.training.feed import Feed
from lejepa_scale.training.start import open_together, start_probe, views_ahead


class Fed:
    """A trial whose views come from shards: reading, colours and the online probe are part of its steps, and so are the
    trainer's small collectives about faults and signals. Nothing waits for a step's end but what waits there too."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.mixture, self.trial = open_together(config), Trial(config, device)
        self.probe = start_probe(config, self.trial.engine, self.mixture.num_classes, {})
        self.told = collectives.begin_sum(torch.tensor(0))

    def feed(self) -> Feed:
        """What a loader that starts at the next step gives."""
        trial = self.trial
        batches = _batches(self.mixture, trial.config, trial.device, trial.number)
        ahead = views_ahead(trial.config, trial.plan)
        return Feed(batches, trial.plan, trial.device, phase=trial.phases, beside=ahead)

    def step(self, feed: Feed) -> None:
        result = self.trial.step(feed.of_step(self.trial.number))
        if self.probe is not None:
            with self.trial.phases("probe"):
                for out, labels in zip(result.outputs, feed.labels, strict=True):
                    self.probe.step(out["features"], labels.to(self.trial.device, non_blocking=True), result.finite)
        told, self.told = self.told, collectives.begin_sum(torch.tensor(0))  # about signals
        told()


def loader_rates(config: Config, device: torch.device, steps: int) -> Iterator[Row]:
    """The loader alone, then with the colours that are applied where training runs."""
    plan = check_world(config, launch.ranks())
    batches = _batches(open_together(config), config, device, 0)
    case = f"{config.data.workers} workers a rank, {plan.micro_batch} images a batch"
    for name, colours in (("loader", False), (f"loader and colours on {device.type}", True)):
        for _ in range(2 + 2 * config.data.workers * config.data.prefetch):  # what was made ahead says nothing
            _consume(next(batches), device, colours)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            _consume(next(batches), device, colours)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        images = steps * plan.micro_batch
        row: Row = {"case": f"{name}, {case}", "images/s": plan.ranks * images / wall}
        if not config.data.workers and device.type == "cpu":
            row["images/s per core"] = images / cpu
        yield row


def _consume(batch: Batch, device: torch.device, colours: bool) -> None:
    if colours:
        batch.augmented(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _batches(mixture: Mixture, config: Config, device: torch.device, first_step: int) -> Iterator[Batch]:
    plan = check_world(config, launch.ranks())
    rank, pin = process_group.rank(), device.type == "cuda"
    seed = config.run.seed
    return iter(Loader(mixture, config.data, plan, seed=seed, rank=rank, first_step=first_step, pin_memory=pin))


def end_to_end(config: Config, device: torch.device, steps: int, trace: Path | None = None) -> Iterator[Row]:
    """From shards to updated weights."""
    fed = Fed(config, device)
    trial, feed = fed.trial, fed.feed()
    for _ in range(WARM + config.data.workers * config.data.prefetch):
        fed.step(feed)
    trial.phases.read()
    started = time.perf_counter()
    for _ in range(steps):
        fed.step(feed)
    spent = trial.phases.read()
    seconds = (time.perf_counter() - started) / steps
    phases = {name: ms / 1e3 / steps for name, ms in spent.items()}
    row = rates(trial, {"step": seconds, **phases})
    row["data wait fraction"] = phases["data wait"] / seconds
    yield row | memory(trial, whole_process=True)
    yield from collective_rows(trial)
    if trace is not None:
        yield from breakdown(trial, lambda: fed.step(feed), trace)
