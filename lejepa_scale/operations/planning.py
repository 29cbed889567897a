"""What a configuration will need and take on GPUs that nobody has to have: memory, traffic, time, images, checkpoints, and
what to change where it does not fit. All of it by the formulas of lejepa_scale/cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from math import ceil, log2
from typing import Any

from lejepa_scale.config import BatchPlan, Config, changed, check_world
from lejepa_scale.config.batches import images_of_statistic
from lejepa_scale.config.durations import in_steps, in_words
from lejepa_scale.config.keys import as_text
from lejepa_scale.cost import StepMemory, step_memory
from lejepa_scale.cost.flops import meta_model
from lejepa_scale.cost.forecast import Forecast, forecast
from lejepa_scale.cost.machines import GPUS_OF_A_HOST, Machine
from lejepa_scale.cost.traffic import Transfer, step_traffic
from lejepa_scale.engine.optim import matrices
from lejepa_scale.errors import UserError

FREE, OF_LIBRARIES = 0.06, 2**30  # of a GPU's memory: what an allocator cannot use, and bytes of a driver and of NCCL
IMAGES_PER_CORE = 262.0  # 2 + 8 views of 224 and 98 px from full-size JPEGs (docs/benchmarks.md, "The input pipeline")
BYTES_PER_SECOND = 1e9  # that a host writes of a checkpoint
_SHOWN = 3  # pieces of advice
_WORTH = 0.97  # of a step's time: what is not faster than this is no advice for a run that fits
# Share of a step that a change more is worth, and half as many images of the statistic.
_A_CHANGE, _A_HALVING = 0.02, 0.05


@dataclass(frozen=True)
class Assumptions:
    """What no formula knows."""

    machine: Machine
    images_per_core: float = IMAGES_PER_CORE
    bytes_per_second: float = BYTES_PER_SECOND

    @property
    def usable(self) -> float:
        """Bytes of a GPU's memory that tensors can have."""
        return (1 - FREE) * self.machine.memory - OF_LIBRARIES


@dataclass(frozen=True)
class Plan:
    """A configuration on a number of GPUs."""

    batches: BatchPlan
    memory: StepMemory
    traffic: list[Transfer]
    forecast: Forecast
    steps: int | None  # of the whole run; None where its length is in epochs of data that nobody counted
    checkpoint: float  # bytes
    statistic: int  # images that the regularizer sees at once
    usable: float

    @property
    def fits(self) -> bool:
        """Whether a rank's memory holds a step."""
        return self.memory.total <= self.usable

    @property
    def images_per_second(self) -> float:
        """Of all ranks."""
        return self.batches.global_batch / self.forecast.seconds

    @property
    def hours(self) -> float | None:
        """Of the whole run, without evaluations and saving."""
        return None if self.steps is None else self.steps * self.forecast.seconds / 3600

    @property
    def hosts(self) -> int:
        """With eight GPUs each."""
        return ceil(self.batches.ranks / GPUS_OF_A_HOST)


@dataclass(frozen=True)
class Advice:
    """Keys to change, and what becomes of it."""

    overrides: tuple[str, ...]
    plan: Plan


def plan_of(config: Config, gpus: int, assumed: Assumptions, samples: int | None = None) -> Plan:
    """`config` on `gpus` ranks. samples: images of the data set, which durations in epochs need. Raises UserError for a
    number of ranks that the configuration refuses."""
    batches = check_world(config, gpus)
    return Plan(
        batches,
        step_memory(config, batches),
        step_traffic(config, batches),
        forecast(config, batches, assumed.machine),
        _steps(config, samples),
        _checkpoint(config),
        images_of_statistic(config, batches),
        assumed.usable,
    )


def advice(config: Config, gpus: int, assumed: Assumptions) -> list[Advice]:
    """The fastest configurations that fit, with other micro-batches, recomputation, sharding or offloading: one of each kind
    of change. Where `config` fits itself, none that is hardly faster, or shows the regularizer fewer images."""
    own = plan_of(config, gpus, assumed)
    found: list[Advice] = []
    for changes in _alternatives(config, own.batches):
        with suppress(UserError):
            if other := _better(changed(config, changes), gpus, assumed, own):
                found.append(Advice(tuple(f"{key}={as_text(value)}" for key, value in changes.items()), other))
    found.sort(key=lambda one: _rank(one, own))
    shown: list[Advice] = []
    for one in found:
        keys, values = {text.partition("=")[0] for text in one.overrides}, set(one.overrides)
        if all(
            keys != {text.partition("=")[0] for text in before.overrides} and not set(before.overrides) <= values
            for before in shown
        ):
            shown.append(one)
    return shown[:_SHOWN]


def _better(config: Config, gpus: int, assumed: Assumptions, own: Plan) -> Plan | None:
    batches = check_world(config, gpus)
    if step_memory(config, batches).total > assumed.usable:
        return None
    other = plan_of(config, gpus, assumed)
    if own.fits and (other.statistic < own.statistic or other.forecast.seconds > _WORTH * own.forecast.seconds):
        return None
    return other


def _rank(one: Advice, own: Plan) -> float:
    """Seconds, and something more for each change and for each halving of what the objective sees at once."""
    less = log2(max(1.0, own.statistic / one.plan.statistic))
    return one.plan.forecast.seconds * (1 + _A_CHANGE * len(one.overrides) + _A_HALVING * less)


def _alternatives(config: Config, batches: BatchPlan) -> Iterator[dict[str, Any]]:
    """Keys and values that differ from `config`; at least one."""
    engine, packed = config.engine, meta_model(config).encoder.packed
    of_rank = batches.micro_batch * batches.accumulation
    halved = [of_rank >> times for times in range(of_rank.bit_length()) if of_rank % (1 << times) == 0]
    sizes = list(dict.fromkeys([batches.micro_batch, *halved, 1]))
    kinds = ["none", "selective", "full"] if packed else ["none", "full"]
    names = list(dict.fromkeys([engine.name, *(["fsdp", "zero3"] if batches.ranks > 1 else [])]))
    now = {
        "train.micro_batch": batches.micro_batch,
        "engine.activation_checkpointing": engine.activation_checkpointing,
        "engine.name": engine.name,
        "engine.cpu_offload": engine.cpu_offload,
        "engine.shard_degree": engine.shard_degree,
    }
    for size, kind, name, offload in product(sizes, kinds, names, (False, True)):
        degree = engine.shard_degree if name == "fsdp" else None
        wanted = dict(zip(now, (size, kind, name, offload, degree), strict=True))
        if changes := {key: value for key, value in wanted.items() if value != now[key]}:
            yield changes


def table(
    config: Config, assumed: Assumptions, gpus: Sequence[int], samples: int | None = None
) -> list[dict[str, Any]]:
    """A row for each number of GPUs, with the same global batch: micro-batches become smaller where there are more ranks
    than they feed, and what cannot be says why."""
    rows = []
    for count in gpus:
        try:
            rows.append(_row(count, plan_of(_fed(config, count), count, assumed, samples)))
        except UserError as error:
            rows.append({"GPUs": count, "cannot run": str(error).split(":")[0]})
    return rows


def _fed(config: Config, gpus: int) -> Config:
    """`config` with the largest micro-batch that is no larger than its own and gives every rank the same."""
    of_rank, rest = divmod(config.train.global_batch, gpus)
    if rest or of_rank == 0:
        return config
    own = min(config.train.micro_batch or of_rank, of_rank)
    size = max(n for n in range(1, own + 1) if of_rank % n == 0)
    return changed(config, {"train.micro_batch": size})


def _row(gpus: int, plan: Plan) -> dict[str, Any]:
    found = plan.forecast
    return {
        "GPUs": gpus,
        "micro-batch": f"{plan.batches.micro_batch} x {plan.batches.accumulation}",
        "GiB a rank": round(plan.memory.total / 2**30, 1),
        "fits": "yes" if plan.fits else "no",
        "step, s": f"{found.seconds:.3g} ({found.fastest:.3g} to {found.slowest:.3g})",
        "MFU": f"{found.mfu():.0%}",
        "network waited for": f"{found.waited / found.seconds:.0%}",
        "images/s a GPU": round(plan.images_per_second / gpus, 1),
        "hours": None if plan.hours is None else round(plan.hours, 1),
        "GPU-hours": None if plan.hours is None else round(gpus * plan.hours),
    }


def _steps(config: Config, samples: int | None) -> int | None:
    if config.train.epochs is not None and samples is None:
        return None
    if config.train.epochs is None and config.train.images is None and not in_words(config):
        return config.train.steps
    if samples is None:  # nothing that is counted in epochs decides the run's length
        images = config.train.images
        return config.train.steps if images is None else images // config.train.global_batch
    return in_steps(config, samples).train.steps


def _checkpoint(config: Config) -> float:
    """fp32 values, AdamW's two moments or Muon's one, and the average where there is one."""
    model = meta_model(config)
    count = sum(p.numel() for p in model.parameters())
    one_moment = sum(p.numel() for p in matrices(model).values()) if config.optim.name == "muon" else 0
    return 4.0 * ((3 + (config.average.kind != "none")) * count - one_moment)
