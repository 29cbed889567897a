"""Steps on images: the loader alone, and from shards to updated weights, as train.py goes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import WARM, Row
from benchmarks.rates import collective_rows, memory, rates
from benchmarks.trace import breakdown
from benchmarks.trial import MakeViews, Trial
from lejepa_scale.config import Config, check_world
from lejepa_scale.data import Batch, Loader, ahead, open_mixture
from lejepa_scale.data.mixture import Mixture
from lejepa_scale.parallel import collectives, launch, process_group
from lejepa_scale.training.probe import OnlineProbe


class Fed:
    """A trial whose views come from shards: reading, colours and the online probe are part of its steps, and so are the
    trainer's small collectives about faults and signals. Nothing waits for a step's end but what waits there too."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.sources, self.trial = _open(config), Trial(config, device)
        self.labels: deque[Tensor] = deque()  # of the micro-batches of a step that were read and not yet learnt from
        self.probe: OnlineProbe | None = None
        if config.probe.enabled and (classes := self.sources.num_classes) > 1:
            width = self.trial.engine.module.encoder.embed_dim
            self.probe = OnlineProbe(width, classes, config.probe.lr, config.run.seed, device)

    def batches(self) -> Iterator[Batch]:
        """What a loader that starts at the next step gives."""
        trial = self.trial
        batches = _batches(self.sources, trial.config, trial.device, trial.number)
        if trial.plan.accumulation > 1 and trial.config.objective.accumulation == "exact":
            return batches  # a step's batches are held as bytes
        return ahead(batches, trial.device)

    def step(self, batches: Iterator[Batch]) -> None:
        self.trial.step(self._micro_batches(batches), then=self._learn)
        collectives.any_rank(False, torch.device("cpu"))

    def _micro_batches(self, batches: Iterator[Batch]) -> Iterator[MakeViews]:
        for _ in range(self.trial.plan.accumulation):
            with self.trial.phases("data wait", host=True):
                batch = next(batches)
                collectives.all_reduce_sum(torch.tensor([len(batch.skipped), 0]))
            self.labels.append(batch.labels)
            yield partial(self._colours, batch)

    def _colours(self, batch: Batch) -> Sequence[Tensor]:
        with self.trial.phases("colours"):
            return batch.augmented(self.trial.device)

    def _learn(self, out: dict[str, Tensor]) -> None:
        labels = self.labels.popleft()
        if self.probe is not None:
            with self.trial.phases("probe"):
                self.probe.step(out["features"], labels.to(self.trial.device, non_blocking=True))


def loader_rates(config: Config, device: torch.device, steps: int) -> Iterator[Row]:
    """The loader alone, then with the colours that are applied where training runs."""
    plan = check_world(config, launch.ranks())
    batches = _batches(_open(config), config, device, 0)
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


def _open(config: Config) -> Mixture:
    collectives.on_rank_zero(lambda: open_mixture(config.data).num_samples)
    return open_mixture(config.data, build=False)


def _batches(sources: Mixture, config: Config, device: torch.device, first_step: int) -> Iterator[Batch]:
    plan = check_world(config, launch.ranks())
    rank, pin = process_group.rank(), device.type == "cuda"
    seed = config.run.seed
    return iter(Loader(sources, config.data, plan, seed=seed, rank=rank, first_step=first_step, pin_memory=pin))


def end_to_end(config: Config, device: torch.device, steps: int, trace: Path | None = None) -> Iterator[Row]:
    """From shards to updated weights."""
    fed = Fed(config, device)
    trial, batches = fed.trial, fed.batches()
    for _ in range(WARM + config.data.workers * config.data.prefetch):
        fed.step(batches)
    trial.phases.read()
    started = time.perf_counter()
    for _ in range(steps):
        fed.step(batches)
    spent = trial.phases.read()
    seconds = (time.perf_counter() - started) / steps
    phases = {name: ms / 1e3 / steps for name, ms in spent.items()}
    row = rates(trial, {"step": seconds, **phases})
    row["data wait fraction"] = phases["data wait"] / seconds
    yield row | memory(trial, whole_process=True)
    yield from collective_rows(trial)
    if trace is not None:
        yield from breakdown(trial, lambda: fed.step(batches), trace)
