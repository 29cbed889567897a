"""Plans beside what is known: memory of real steps on CPU ranks, steps that were measured on a GPU, runs that others have
published, and the table of the largest recipes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed._tools.mem_tracker import MemTracker

from benchmarks.measure import Row
from benchmarks.ports import free_port
from lejepa_scale.config import BatchPlan, Config, changed, check_world, load_config
from lejepa_scale.cost import step_memory
from lejepa_scale.cost.forecast import forecast
from lejepa_scale.cost.machines import machine
from lejepa_scale.operations import planning
from lejepa_scale.parallel import launch, process_group
from lejepa_scale.training.start import start_engine
from lejepa_scale.training.step import train_step

CONFIGS = Path(__file__).parents[2] / "configs"
_FEW = ("data.views.global.count=2", "data.views.local.count=2", "engine.compile=false", "engine.precision=fp32")
_VIT = (
    "data.views.local.size=96",
    "train.micro_batch=2",
    *_FEW,
    "engine.activation_checkpointing=none",
    "model.drop_path=0",
    "model.options={}",
)
# (name, recipe, keys): small batches of few views, which two cores can take
MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "quickstart": ("quickstart", ()),
    "ViT-S/16": ("vitl_in1k", ("model.encoder=vit_small_patch16_224", *_VIT)),
    "ViT-B/16": ("vitl_in1k", ("model.encoder=vit_base_patch16_224", *_VIT)),
    "ViT-L/16": ("vitl_in1k", ("model.encoder=vit_large_patch16_224", *_VIT)),
}
RANKS = (1, 2, 4)
_GPUS, _AT_LEAST = tuple(2**n for n in range(3, 13)), 2


def memory(models: Sequence[str], ranks: Sequence[int]) -> Iterator[Row]:
    """The most that tensors take in a step on rank 0, as torch's own tracker sees it, beside the formula: `single` on one
    rank, `fsdp` on more."""
    for name in models:
        for count in ranks:
            config = _configured(name, count)
            formula = step_memory(config, check_world(config, count), "cpu").total
            measured = _measured(name, count)
            yield {
                "case": f"{name}, {config.engine.name}", "ranks": count, "GiB by formula": formula / 2**30,
                "GiB measured": measured / 2**30, "ratio": formula / measured,
            }  # fmt: skip


def _configured(name: str, ranks: int) -> Config:
    recipe, keys = MODELS[name]
    engine = "single" if ranks == 1 else "fsdp"
    config = load_config(CONFIGS / f"{recipe}.yaml", [*keys, f"engine.name={engine}", "data.shards=s"])
    micro = config.train.micro_batch or 32
    batch = [
        f"train.micro_batch={micro}",
        f"train.global_batch={micro * ranks}",
        f"engine.name={engine}",
        "data.shards=s",
    ]
    return load_config(CONFIGS / f"{recipe}.yaml", [*keys, *batch])


def _measured(name: str, ranks: int) -> float:
    words = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={free_port()}"]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}:{root / 'tools'}"}
    done = subprocess.run(
        [sys.executable, *words, "-m", "benchmarks.plans", name],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return float(next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))["bytes"])


def _of_a_rank(name: str) -> float:
    """Bytes, of the third step; every rank calls."""
    config = _configured(name, launch.ranks())
    with process_group.joined(timedelta(minutes=5)) as device:
        plan = check_world(config, launch.ranks())
        engine = start_engine(config, plan, device)
        groups = [group for group in (config.data.views.global_, config.data.views.local) if group.count]

        def step(number: int) -> None:
            views = [torch.randn(g.count, plan.micro_batch, config.data.channels, g.size, g.size) for g in groups]
            train_step(engine, plan, [lambda: views], number=number, seed=0, lr=1e-4, weight_decay=0.05)

        for number in range(2):
            step(number)
        tracker = MemTracker()
        tracker.track_external(engine.module, engine.optimizer)  # type: ignore[attr-defined]
        with tracker:
            step(2)
        peak = max(of["Total"] for of in tracker.get_tracker_snapshot("peak").values())
        engine.close()
    return float(peak)


@dataclass(frozen=True)
class Published:
    """A run of others: `rate` images/s a GPU. The student's and the teacher's views; heads, masks and losses are left out.
    The number of GPUs and their micro-batches are assumed where nobody has said them."""

    name: str
    recipe: str
    keys: tuple[str, ...]
    chip: str
    gpus: int
    rate: float


PUBLISHED = (
    Published(
        "DINOv2 ViT-g/14, 22,000 A100-hours", "vitg_lvd",
        ("engine.name=fsdp", "engine.compile=false", "engine.activation_checkpointing=none", "train.micro_batch=12",
         "train.global_batch=3072"),
        "a100", 256, 24.0,
    ),
    Published(
        "DINOv3 ViT-7B/16, 61,440 H100-hours", "vitg_lvd",
        ("model.encoder=vit_7b_patch16_dinov3", "model.options={}", "engine.name=fsdp", "engine.compile=true",
         "engine.activation_checkpointing=full", "train.micro_batch=16", "train.global_batch=4096", "engine.fp8=true",
         "data.views.global.size=256", "data.views.local.size=112"),
        "h100", 256, 18.5,
    ),
)  # fmt: skip


def published() -> Iterator[Row]:
    """Images/s of a GPU that the forecast gives them: a step of ours with their views, and a forward pass of a teacher over
    the global ones."""
    for run in PUBLISHED:
        config = load_config(CONFIGS / f"{run.recipe}.yaml", list(run.keys))
        plan, chip = check_world(config, run.gpus), machine(run.chip)
        student = forecast(config, plan, chip)
        alone = load_config(
            CONFIGS / f"{run.recipe}.yaml",
            [*run.keys, "data.views.local.count=0", "model.drop_path=0", "model.drop_path_uniform=false"],
        )
        teacher = forecast(alone, BatchPlan(micro_batch=plan.micro_batch, ranks=1), chip)
        passes = (teacher.products + teacher.attention + teacher.memory) / (
            4 if alone.engine.activation_checkpointing == "full" else 3
        )
        images = plan.micro_batch * plan.accumulation
        rates = [images / (seconds + passes) for seconds in (student.seconds, student.fastest, student.slowest)]
        yield {
            "case": run.name, "GPUs": f"{run.gpus} x {chip.chip}", "images/s a GPU, reported": run.rate,
            "forecast": rates[0], "between": f"{rates[2]:.3g} and {rates[1]:.3g}",
            "forecast over reported": rates[0] / run.rate,
        }  # fmt: skip


def scaling(recipes: Sequence[str], chips: Sequence[str]) -> Iterator[Row]:
    """The recipes on 8 to 4,096 GPUs; with a larger batch where theirs is less than two images a GPU."""
    for recipe in recipes:
        config = load_config(CONFIGS / f"{recipe}.yaml")
        for chip in chips:
            for gpus in _GPUS:
                batch = max(config.train.global_batch, _AT_LEAST * gpus)
                given = (
                    config
                    if batch == config.train.global_batch
                    else changed(config, {"train.global_batch": batch, "train.micro_batch": None})
                )
                for row in planning.table(given, planning.Assumptions(machine(chip)), [gpus]):
                    yield {"case": f"{recipe}, {chip}", "batch": batch} | row


if __name__ == "__main__":
    found = _of_a_rank(sys.argv[1])
    if launch.rank() == 0:
        print(json.dumps({"bytes": found}), flush=True)
