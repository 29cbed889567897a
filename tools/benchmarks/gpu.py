"""Checks and timings of everything that behaves differently on a GPU. Each section is a function from sizes to rows;
a row holds numbers, and `ok` where something was checked rather than measured."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from benchmarks import step
from benchmarks.compare import compare as compare_forms
from benchmarks.measure import Results, Row, milliseconds, run_sections
from benchmarks.sigreg import Shape, compare
from benchmarks.waits import on_a_gpu
from lejepa_scale.checkpoint import gather
from lejepa_scale.config import check_world
from lejepa_scale.data.images import photometric
from lejepa_scale.errors import UserError
from lejepa_scale.model.attention import BACKENDS, Packing, offsets
from lejepa_scale.training.start import start_engine
from lejepa_scale.training.step import train_step

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Sizes:
    """One scale of the whole benchmark."""

    heads: tuple[tuple[int, int], ...]  # (heads, width of a head)
    packing: Packing
    precision: tuple[str, tuple[str, ...], int]  # recipe, overrides, images
    sigreg: tuple[Shape, ...]
    views: tuple[int, int]  # (images, side) of the colour operations
    training: tuple[int, int]  # (steps, global batch) of the short run
    steps: tuple[tuple[str, tuple[str, ...], int], ...]  # recipe, overrides, images a step
    largest: tuple[tuple[str, tuple[str, ...], int], ...]  # recipe, overrides, images that fit
    features: tuple[tuple[str, tuple[str, ...], int, tuple[str, ...]], ...]  # recipe, overrides, images, features
    repeats: int


# 2 x 224 + 6 x 98 px, as ViT-L. DINOv2's layer scale of 1e-5 leaves first features that differ by less than bf16 can say:
# whether two forms agree would be chance.
_VITG = ("data.views.local.count=6", "model.options={init_values: 1.0}")
FULL = Sizes(
    heads=((6, 64), (16, 64), (24, 64), (16, 88), (16, 104)),  # ViT-S, L, g/14 of DINOv2, g/14 of timm, gigantic
    packing=Packing(((2 * 16, 257), (8 * 16, 50))),
    precision=(
        "configs/vitl_in1k.yaml",
        ("model.encoder=vit_small_patch14_dinov2", "model.options={init_values: 0.01}", "model.drop_path=0"),
        16,
    ),
    sigreg=(
        Shape(512, 64, 1024),
        Shape(8192, 64, 1024),
        Shape(8192, 256, 1024),
        Shape(8192, 64, 8192),
        Shape(32768, 64, 1024),
    ),
    views=(1024, 224),
    training=(60, 256),
    steps=(
        ("configs/vitl_in1k.yaml", ("model.encoder=vit_small_patch16_224", "data.views.local.size=96"), 256),
        ("configs/vitl_in1k.yaml", (), 64),
        ("configs/vitg_lvd.yaml", (*_VITG, "engine.activation_checkpointing=none"), 24),
        ("configs/vitg_lvd.yaml", (*_VITG, "engine.activation_checkpointing=full"), 48),
    ),
    largest=(
        ("configs/vitl_in1k.yaml", ("engine.activation_checkpointing=none",), 32),
        ("configs/vitg_lvd.yaml", (*_VITG, "engine.activation_checkpointing=none"), 8),
        ("configs/vitg_lvd.yaml", (*_VITG, "engine.activation_checkpointing=full"), 32),
    ),
    features=(
        ("configs/vitl_in1k.yaml", (), 32, ("packed", "attention", "optimizer", "checkpointing", "compile", "float8")),
        ("configs/vitl_in1k.yaml", ("model.drop_path=0.3", "model.drop_path_uniform=true"), 32, ("stochastic-depth",)),
        ("configs/vitg_lvd.yaml", (*_VITG, "engine.compile=true"), 8, ("checkpointing", "compile", "float8")),
        ("configs/vitg_lvd.yaml", _VITG, 8, ("packed", "attention", "stochastic-depth", "optimizer")),
    ),
    repeats=10,
)
TOY = Sizes(
    heads=((2, 16),),
    packing=Packing(((4, 17), (6, 5))),
    precision=("configs/vits_cifar10.yaml", (), 8),
    sigreg=(Shape(256, 16, 64),),
    views=(8, 32),
    training=(12, 32),
    steps=(("configs/vits_cifar10.yaml", (), 8),),
    largest=(),
    features=(
        ("configs/vits_cifar10.yaml", ("model.options={depth: 2}", "model.drop_path=0.3"), 4, ("stochastic-depth",)),
        ("configs/vits_cifar10.yaml", ("model.options={depth: 2}",), 4, ("packed", "checkpointing", "optimizer")),
    ),
    repeats=2,
)


def measure(sizes: Sizes, device: torch.device, minutes: float, only: Sequence[str] = ()) -> Results:
    """Every section in turn, or those of `only`; those that the time does not reach say so."""
    return run_sections({name: SECTIONS[name](sizes, device) for name in only or SECTIONS}, device, minutes)


def attention(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Each packed backend against float64 attention per sequence: output and gradients; then its time."""
    for heads, width in sizes.heads:
        tokens = sum(sizes.packing.lengths)
        generator = torch.Generator(device).manual_seed(0)
        exact = torch.randn(4, tokens, heads, width, generator=generator, device=device, dtype=torch.float64)
        truth = _attention_with_gradients(BACKENDS["sdpa"], exact, sizes.packing)
        for name, backend in BACKENDS.items():
            row: Row = {"case": f"{name} {heads} heads of {width}", "tokens": tokens}
            work = partial(_attention_with_gradients, backend, exact.to(torch.bfloat16), sizes.packing)
            try:
                found = work()
            except (UserError, RuntimeError, NotImplementedError, ValueError) as reason:
                yield row | {"cannot run": " ".join(str(reason).split())[:600]}
                continue
            error = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True))
            yield row | {"ok": error < 2e-2, "error": error, "ms": milliseconds(work, device, sizes.repeats)}


def _attention_with_gradients(backend: Any, qkvg: Tensor, packing: Packing) -> list[Tensor]:
    q, k, v = (x.detach().clone().requires_grad_() for x in qkvg[:3])
    out = backend(q, k, v, packing, offsets(packing, q.device))
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), qkvg[3])]


def precision(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """One step of the same weights in fp32 and in bf16: the losses and the direction of the gradient."""
    recipe, overrides, images = sizes.precision
    found = {}
    for name in ("fp32", "bf16"):
        config = _recipe(recipe, (*overrides, f"engine.precision={name}"), images).config()
        plan = check_world(config, 1)
        engine, views = start_engine(config, plan, device), step.synthetic_views(config, images, device)
        result = train_step(engine, plan, [partial(list, views)], number=0, seed=0, lr=0.0, weight_decay=0.0)
        state = gather(engine)
        assert state is not None
        gradient = torch.cat([moment.flatten() for moment in state.moments["exp_avg"].values()])  # its direction
        found[name] = float(result.loss), gradient
        del engine
    (exact, g32), (low, g16) = found["fp32"], found["bf16"]
    cosine = float(torch.nn.functional.cosine_similarity(g32.double(), g16.double(), dim=0))
    difference = abs(low - exact) / exact
    yield {
        "case": f"{recipe} bf16 against fp32",
        "ok": difference < 0.02 and cosine > 0.98,
        "loss": exact,
        "relative difference": difference,
        "gradient cosine": cosine,
    }


def training(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """The launcher on rendered scenes, engine by engine: the loss falls, and all engines tell the same story."""
    steps, batch = sizes.training
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder, "scenes")
        _call("tools/make_shards.py", "synthetic", "--out", shards, "--count", max(256, 4 * batch), "--size", 64)
        reference: list[float] = []
        for engine in ("single", "ddp", "fsdp", "zero1", "zero3"):
            run = Path(folder, engine)
            started = time.monotonic()
            arguments = [
                "launchers/train.py", "--config", "configs/vits_cifar10.yaml", f"run.dir={run}", f"data.shards={shards}",
                f"train.steps={steps}", f"train.global_batch={batch}", f"engine.name={engine}", "engine.precision=bf16",
                "optim.warmup_steps=2", "log.every=1", "checkpoint.every=1000000", "data.workers=2", "run.seed=1",
            ]  # fmt: skip
            failure = _try(*arguments)
            if failure is not None:
                yield {"case": f"{engine}, {steps} steps of {batch}", "ok": False, "failure": failure}
                continue
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            losses = [line["loss"] for line in lines]
            quarter = len(losses) // 4
            reference = reference or losses
            drift = max(abs(a / b - 1) for a, b in zip(losses[:5], reference[:5], strict=True))
            yield {
                "case": f"{engine}, {steps} steps of {batch}",
                "ok": mean(losses[-quarter:]) < mean(losses[:quarter]) and drift < 0.05,
                "loss, first quarter": mean(losses[:quarter]),
                "loss, last quarter": mean(losses[-quarter:]),
                "drift from single, 5 steps": drift,
                "images/s": median([line["images_per_second"] for line in lines[len(lines) // 2 :]]),
                "seconds in all": time.monotonic() - started,
            }


def step_rates(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Whole optimizer steps, and the largest batches: what the input pipeline has to keep up with."""
    for recipe, overrides, images in sizes.steps:
        yield step.alone(_recipe(recipe, (*overrides, "engine.precision=bf16"), images), device, sizes.repeats)
    for recipe, overrides, images in sizes.largest:
        yield step.largest_batch(_recipe(recipe, (*overrides, "engine.precision=bf16"), images), device, images)


def step_features(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """What each feature of a step is worth: the recipe and each other form of the feature, in turns."""
    for recipe, overrides, images, features in sizes.features:
        setting = _recipe(recipe, (*overrides, "engine.precision=bf16"), images)
        for feature in features:
            for row in compare_forms(setting, feature, device, sizes.repeats):
                yield row | {"case": f"{setting.config().model.encoder}, batch {images}, {feature}: {row['case']}"}


def sigreg(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """SIGReg in every arithmetic that runs here, against the textbook form and the two GEMMs alone."""
    for shape in sizes.sigreg:
        yield compare(shape, device, sizes.repeats)


def colours(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Batched colour operations on the device, against the CPU's result."""
    import numpy as np

    from lejepa_scale.config import Augment

    images, side = sizes.views
    pictures = torch.randint(
        0, 256, (images, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    parameters = torch.from_numpy(
        photometric.draw(np.random.default_rng(0).random((images, photometric.DRAWS)), Augment())
    )
    moved = pictures.to(device)
    few = slice(0, min(64, images))
    ours, oracle = (photometric.apply(x[few], parameters[few]).cpu() for x in (moved, pictures))
    seconds = milliseconds(lambda: photometric.apply(moved, parameters), device, sizes.repeats) / 1e3
    # a value within rounding of the solarize threshold may fall on either side
    differing = float(((ours - oracle).abs() > 1e-3).float().mean())
    yield {
        "case": f"{images} views of {side} px",
        "ok": differing < 1e-4,
        "share that differs": differing,
        "views/s": images / seconds,
    }


def waits(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Where the host of the trainer's loop waits for the device, by torch's own detector. A CPU is never waited for."""
    recipe, overrides, images = sizes.steps[0]
    quiet = ("train.steps=8", "optim.warmup_steps=0", "log.every=2")
    config = _recipe(recipe, (*overrides, *quiet), images).config()
    case = f"{config.model.encoder}, {images} images"
    if device.type != "cuda":
        yield {"case": case, "waits a step": 0}
        return
    middle = on_a_gpu(config, device)[3:-1]  # of the first ones, kernels are compiled and memory is found
    places = Counter(place for step in middle for place in step)
    yield {"case": case, "waits a step": sum(places.values()) / len(middle), "ok": not places, "where": dict(places)}


SECTIONS: dict[str, Callable[[Sizes, torch.device], Iterator[Row]]] = {
    section.__name__.replace("_", "-"): section
    for section in (attention, precision, step_rates, waits, training, sigreg, colours, step_features)
}


def _recipe(recipe: str, overrides: tuple[str, ...], images: int) -> step.Recipe:
    """A recipe as one process runs it on one batch."""
    return step.Recipe(ROOT / recipe, (*overrides, "engine.name=single")).of(images)


def _call(*arguments: object) -> None:
    failure = _try(*arguments)
    if failure is not None:
        raise UserError(f"{arguments[0]} failed: {failure}")


def _try(*arguments: object) -> str | None:
    """Run one of our programs; None, or the end of what it said."""
    command = [sys.executable, *map(str, arguments)]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return "no end after 120 s"
    return None if result.returncode == 0 else result.stderr.strip()[-1000:]
