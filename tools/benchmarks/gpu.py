"""Checks and timings of everything that behaves differently on a GPU, the most valuable first. Each section is a function
from sizes to cases; a row of a case holds numbers, and `ok` where something was checked rather than measured."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from benchmarks import kernels, rates, step, world
from benchmarks.apart import Case, run, usable
from benchmarks.compare import compare as compare_forms
from benchmarks.measure import Results, Row, milliseconds
from benchmarks.sigreg import Shape, compare
from benchmarks.trial import Trial
from lejepa_scale.checkpoint import gather
from lejepa_scale.config import check_world
from lejepa_scale.cost import step_memory
from lejepa_scale.data.images import photometric
from lejepa_scale.data.make import sources
from lejepa_scale.data.make.writer import write_shards
from lejepa_scale.errors import UserError
from lejepa_scale.model.attention import BACKENDS, Packing, offsets
from lejepa_scale.training.start import start_engine
from lejepa_scale.training.step import train_step

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Setting:
    """A recipe as one process runs it on one batch, and what it is called."""

    name: str
    recipe: str
    images: int
    overrides: tuple[str, ...] = ()
    late: bool = False  # it takes long, such as to compile

    def of(self, *more: str) -> step.Recipe:
        return step.Recipe(ROOT / self.recipe, (*self.overrides, "engine.name=single", *more)).of(self.images)

    def but(self, name: str, *overrides: str, late: bool = False) -> Setting:
        return replace(self, name=f"{self.name}, {name}", overrides=(*self.overrides, *overrides), late=late)

    def recomputing(self, *, late: bool = False) -> Setting:
        return self.but("recomputing all", "engine.activation_checkpointing=full", late=late)

    def compiled(self, *, late: bool = False) -> Setting:
        return self.but("compiled", "engine.compile=true", late=late)


@dataclass(frozen=True)
class Sizes:
    """One scale of the whole benchmark."""

    name: str
    steps: tuple[Setting, ...]
    largest: tuple[Setting, ...]  # with images that fit
    heads: tuple[tuple[int, int], ...]  # (heads, width of a head)
    packing: Packing
    precision: Setting
    sigreg: tuple[Shape, ...]
    waits: Setting
    profile: tuple[Setting, ...]
    memory: tuple[Setting, ...]
    elements: int  # in a collective
    engines: tuple[str, ...]  # each alone in its world
    engine: Setting
    training: tuple[int, int, tuple[str, ...]]  # (steps, global batch, engines) of the short runs
    views: tuple[int, int]  # (images, side) of the colour operations
    features: tuple[tuple[Setting, tuple[str, ...]], ...]
    repeats: int


_VITS = Setting(
    "ViT-S/16, batch 256",
    "configs/vitl_in1k.yaml",
    256,
    ("model.encoder=vit_small_patch16_224", "data.views.local.size=96"),
)
_VITL = Setting("ViT-L/14, batch 64", "configs/vitl_in1k.yaml", 64)
# 2 x 224 + 6 x 98 px, as ViT-L. DINOv2's layer scale of 1e-5 leaves first features that differ by less than bf16 can say:
# whether two forms agree would be chance.
_VITG = Setting(
    "ViT-g/14, batch 24",
    "configs/vitg_lvd.yaml",
    24,
    (
        "data.views.local.count=6",
        "model.options={init_values: 1.0}",
        "engine.activation_checkpointing=none",
        "engine.compile=false",
    ),
)
_MODELS = (_VITS, _VITL, _VITG)


def _batch(setting: Setting, images: int) -> Setting:
    return replace(setting, name=setting.name.replace(f"batch {setting.images}", f"batch {images}"), images=images)


FULL = Sizes(
    name="full",
    steps=(
        _VITL,
        _VITG,
        _VITL.compiled(),
        _VITG.compiled(),
        _VITS,
        _batch(_VITG, 48).recomputing(late=True),
        _VITS.compiled(late=True),
    ),
    largest=(_batch(_VITL, 32), _batch(_VITG, 8), _batch(_VITG, 32).recomputing()),
    heads=((6, 64), (16, 64), (24, 64), (16, 88), (16, 104)),  # ViT-S, L, g/14 of DINOv2, g/14 of timm, gigantic
    packing=Packing(((2 * 16, 257), (8 * 16, 50))),
    precision=Setting(
        "ViT-S/14, batch 16",
        "configs/vitl_in1k.yaml",
        16,
        ("model.encoder=vit_small_patch14_dinov2", "model.options={init_values: 0.01}", "model.drop_path=0"),
    ),
    sigreg=(
        Shape(512, 64, 1024),
        Shape(8192, 64, 1024),
        Shape(8192, 256, 1024),
        Shape(8192, 64, 8192),
        Shape(32768, 64, 1024),
    ),
    waits=_VITS,
    profile=(_VITL, _VITL.compiled(late=True)),
    memory=tuple(setting for model in _MODELS for setting in (model, model.recomputing(), model.compiled(late=True))),
    elements=2**24,
    engines=("ddp", "fsdp", "zero3"),
    engine=Setting("vit_nano", "configs/vits_cifar10.yaml", 64, ("optim.name=adamw",)),  # which zero3 can
    training=(60, 256, ("single", "ddp", "fsdp", "zero1", "zero3")),
    views=(1024, 224),
    features=(
        (_batch(_VITL, 32), ("packed", "attention", "optimizer", "checkpointing", "compile", "float8")),
        (
            _batch(_VITL, 32).but("dropping 0.3", "model.drop_path=0.3", "model.drop_path_uniform=true"),
            ("stochastic-depth",),
        ),
        (_batch(_VITG, 8), ("packed", "attention", "stochastic-depth", "optimizer")),
        (_batch(_VITG, 8).compiled(late=True), ("checkpointing", "compile", "float8")),
    ),
    repeats=10,
)
_TINY = Setting("vit_nano, batch 4", "configs/vits_cifar10.yaml", 4, ("model.options={depth: 2}", "optim.name=adamw"))
TOY = Sizes(
    name="toy",
    steps=(_TINY,),
    largest=(),
    heads=((2, 16),),
    packing=Packing(((4, 17), (6, 5))),
    precision=_batch(_TINY, 8),
    sigreg=(Shape(256, 16, 64),),
    waits=_TINY,
    profile=(_TINY,),
    memory=(_TINY, _TINY.recomputing(late=True)),
    elements=1000,
    engines=("ddp", "fsdp", "zero3"),
    engine=_TINY,
    training=(8, 32, ("single", "fsdp")),
    views=(8, 32),
    features=(
        (_TINY.but("dropping 0.3", "model.drop_path=0.3"), ("stochastic-depth",)),
        (_TINY, ("packed",)),
    ),
    repeats=2,
)


def measure(
    sizes: Sizes,
    device: torch.device,
    minutes: float,
    only: Sequence[str] = (),
    *,
    path: Path | None = None,
    again: bool = False,
    command: str = "",
) -> Results:
    """Every section in turn, or those of `only`, but for what `path` holds already. Raises UserError."""
    sections = {name: SECTIONS[name](sizes) for name in SECTIONS if name in only or not only}
    return run(
        sections, device, minutes=minutes, sizes=sizes.name, command=command, path=path, again=again, preload=[__name__]
    )


def step_rates(sizes: Sizes) -> list[Case]:
    """Whole optimizer steps beside a product of matrices, and the largest batches: what the input pipeline has to keep up
    with."""
    steps = [Case(s.name, partial(_step_rate, s, sizes.repeats), limit=180, late=s.late) for s in sizes.steps]
    return steps + [Case(f"largest: {s.name}", partial(_largest, s), late=True) for s in sizes.largest]


def _step_rate(setting: Setting, repeats: int, device: torch.device, _: Sequence[Row]) -> Iterator[Row]:
    yield step.alone(setting.of("engine.precision=bf16"), device, repeats) | {"case": setting.name}


def _largest(setting: Setting, device: torch.device, _: Sequence[Row]) -> Iterator[Row]:
    yield step.largest_batch(setting.of("engine.precision=bf16"), device, setting.images)


def attention(sizes: Sizes) -> list[Case]:
    """Each packed backend against float64 attention per sequence: output and gradients; then its time."""
    return [
        Case(f"{name} {heads} heads of {width}", partial(_attention, name, heads, width, sizes.packing, sizes.repeats))
        for heads, width in sizes.heads
        for name in BACKENDS
    ]


def _attention(
    name: str, heads: int, width: int, packing: Packing, repeats: int, device: torch.device, _: Sequence[Row]
) -> Iterator[Row]:
    tokens = sum(packing.lengths)
    generator = torch.Generator(device).manual_seed(0)
    exact = torch.randn(4, tokens, heads, width, generator=generator, device=device, dtype=torch.float64)
    row: Row = {"case": f"{name} {heads} heads of {width}", "tokens": tokens}
    work = partial(_attention_with_gradients, BACKENDS[name], exact.to(torch.bfloat16), packing)
    try:
        found = work()
    except (UserError, RuntimeError, NotImplementedError, ValueError) as reason:
        if not usable(device):  # it did run, and something broke
            raise
        yield row | {"cannot run": " ".join(str(reason).split())[:600]}
        return
    truth = _attention_with_gradients(BACKENDS["sdpa"], exact, packing)
    error = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True))
    yield row | {"ok": error < 2e-2, "error": error, "ms": milliseconds(work, device, repeats)}


def _attention_with_gradients(backend: Any, qkvg: Tensor, packing: Packing) -> list[Tensor]:
    q, k, v = (x.detach().clone().requires_grad_() for x in qkvg[:3])
    out = backend(q, k, v, packing, offsets(packing, q.device))
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), qkvg[3])]


def precision(sizes: Sizes) -> list[Case]:
    """One step of the same weights in fp32 and in bf16: the losses and the direction of the gradient."""
    return [Case(sizes.precision.name, partial(_precision, sizes.precision))]


def _precision(setting: Setting, device: torch.device, _: Sequence[Row]) -> Iterator[Row]:
    found = {}
    for name in ("fp32", "bf16"):
        config = setting.of(f"engine.precision={name}").config()
        plan = check_world(config, 1)
        engine, views = start_engine(config, plan, device), step.synthetic_views(config, setting.images, device)
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
        "case": f"{setting.name}, bf16 against fp32",
        "ok": difference < 0.02 and cosine > 0.98 and not torch.equal(g32, g16),  # else bf16 was not bf16
        "loss": exact,
        "relative difference": difference,
        "gradient cosine": cosine,
    }


def sigreg(sizes: Sizes) -> list[Case]:
    """SIGReg in every arithmetic that runs here, against the textbook form and the two GEMMs alone."""
    return [Case(str(shape), partial(_sigreg, shape, sizes.repeats)) for shape in sizes.sigreg]


def _sigreg(shape: Shape, repeats: int, device: torch.device, _: Sequence[Row]) -> Iterator[Row]:
    yield compare(shape, device, repeats)


def waits(sizes: Sizes) -> list[Case]:
    """Where the host of the trainer's loop waits for the device, by torch's own detector. A CPU is never waited for."""
    return [Case(sizes.waits.name, partial(_waits, sizes.waits))]


def _waits(setting: Setting, device: torch.device, _: Sequence[Row]) -> Iterator[Row]:
    config = setting.of("train.steps=8", "optim.warmup_steps=0", "log.every=2").config()
    if device.type != "cuda":
        yield {"case": setting.name, "waits a step": 0}
        return
    from benchmarks.waits import on_a_gpu  # it asks CUDA for devices, which the server of the processes must not

    middle = on_a_gpu(config, device)[3:-1]  # of the first ones, kernels are compiled and memory is found
    places = Counter(place for step in middle for place in step)
    yield {
        "case": setting.name,
        "waits a step": sum(places.values()) / len(middle),
        "ok": not places,
        "where": dict(places),
    }


def profile(sizes: Sizes) -> list[Case]:
    """The longest kernels of a step, and what its time goes to."""
    return [Case(s.name, partial(_profile, s, sizes.repeats), limit=180, late=s.late) for s in sizes.profile]


def _profile(setting: Setting, repeats: int, device: torch.device, _: Sequence[Row]) -> Iterator[Row]:
    for row in kernels.profile(Trial(setting.of("engine.precision=bf16").config(), device), repeats):
        yield row | {"case": f"{setting.name}: {row['case']}"}


def memory(sizes: Sizes) -> list[Case]:
    """The peak of a step against the formula's, and the formula's parts."""
    return [Case(s.name, partial(_memory, s), limit=180, late=s.late) for s in sizes.memory]


def _memory(setting: Setting, device: torch.device, _: Sequence[Row]) -> Iterator[Row]:
    """On CUDA all that the allocator held at once; on a CPU what came above that which is kept between steps."""
    config = setting.of("engine.precision=bf16").config()
    cuda = device.type == "cuda"
    trial = Trial(config, device, shared=True)
    formula = step_memory(config, trial.plan, "cuda" if cuda else "cpu")
    found = rates.memory(trial)
    peak = found["peak MiB" if cuda else "working MiB"] / 2**10
    expected = (formula.total if cuda else formula.total - formula.parameters - formula.moments) / 2**30
    row: Row = {"case": setting.name, "peak GiB": peak, "formula GiB": expected, "peak / formula": peak / expected}
    if cuda:
        row["reserved GiB"] = torch.cuda.max_memory_reserved(device) / 2**30
    parts = ("parameters", "gradients", "moments", "gathered", "buckets", "inputs", "activations", "working", "update")
    yield row | {f"{part} GiB": getattr(formula, part) / 2**30 for part in parts}


def nccl(sizes: Sizes) -> list[Case]:
    """Collectives and engines in a process group of one."""
    calls = [Case(n, partial(world.collective, n, sizes.elements, sizes.repeats), 45) for n in world.COLLECTIVES]
    recipe = sizes.engine.of("engine.precision=bf16")
    return calls + [Case(name, partial(world.engine, name, recipe)) for name in sizes.engines]


def training(sizes: Sizes) -> list[Case]:
    """The launcher on rendered scenes, engine by engine: the loss falls, and all engines tell the same story."""
    steps, batch, engines = sizes.training
    return [Case(engine, partial(_training, engine, steps, batch)) for engine in engines]


def _training(engine: str, steps: int, batch: int, device: torch.device, earlier: Sequence[Row]) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        shards, run = Path(folder, "scenes"), Path(folder, "run")
        count = max(256, 4 * batch)
        scenes = sources.scenes(count, 64, 0, "png", 90)
        write_shards(
            scenes.samples, shards, per_shard=1000, total=count, classes=scenes.classes, description={"scenes": count}
        )
        started = time.monotonic()
        command = [
            sys.executable, "launchers/train.py", "--config", "configs/vits_cifar10.yaml", f"run.dir={run}",
            f"data.shards={shards}", f"train.steps={steps}", f"train.global_batch={batch}", f"engine.name={engine}",
            "engine.precision=bf16", "optim.name=adamw", "optim.warmup_steps=2", "log.every=1", "checkpoint.every=1000000",
            "data.workers=2", "run.seed=1",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # the case has its limit
        if done.returncode:
            raise RuntimeError(f"launchers/train.py: {done.stderr.strip()[-1000:]}")
        spent = time.monotonic() - started
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    quarter, first = len(losses) // 4, losses[:5]
    reference = next((row["first losses"] for row in earlier if "first losses" in row), first)
    drift = max(abs(a / b - 1) for a, b in zip(first, reference, strict=True))
    yield {
        "case": f"{engine}, {steps} steps of {batch}",
        "ok": mean(losses[-quarter:]) < mean(losses[:quarter]) and drift < 0.05,
        "loss, first quarter": mean(losses[:quarter]),
        "loss, last quarter": mean(losses[-quarter:]),
        "drift from the first engine, 5 steps": drift,
        "images/s": median([line["images_per_second"] for line in lines[len(lines) // 2 :]]),
        "seconds in all": spent,
        "first losses": first,
    }


def colours(sizes: Sizes) -> list[Case]:
    """Batched colour operations on the device, against the CPU's result."""
    images, side = sizes.views
    return [Case(f"{images} views of {side} px", partial(_colours, images, side, sizes.repeats))]


def _colours(images: int, side: int, repeats: int, device: torch.device, _: Sequence[Row]) -> Iterator[Row]:
    import numpy as np

    from lejepa_scale.config import Augment

    pictures = torch.randint(
        0, 256, (images, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    parameters = torch.from_numpy(
        photometric.draw(np.random.default_rng(0).random((images, photometric.DRAWS)), Augment())
    )
    moved = pictures.to(device)
    few = slice(0, min(64, images))
    ours, oracle = (photometric.apply(x[few], parameters[few]).cpu() for x in (moved, pictures))
    seconds = milliseconds(lambda: photometric.apply(moved, parameters), device, repeats) / 1e3
    # a value within rounding of the solarize threshold may fall on either side
    differing = float(((ours - oracle).abs() > 1e-3).float().mean())
    yield {
        "case": f"{images} views of {side} px",
        "ok": differing < 1e-4,
        "share that differs": differing,
        "views/s": images / seconds,
    }


def step_features(sizes: Sizes) -> list[Case]:
    """What each feature of a step is worth: the recipe and each other form of the feature, in turns."""
    return [
        Case(
            f"{setting.name}, {feature}",
            partial(_feature, setting, feature, sizes.repeats),
            limit=240,
            late=setting.late or feature in ("compile", "float8"),
        )
        for setting, features in sizes.features
        for feature in features
    ]


def _feature(setting: Setting, feature: str, repeats: int, device: torch.device, _: Sequence[Row]) -> Iterable[Row]:
    for row in compare_forms(setting.of("engine.precision=bf16"), feature, device, repeats):
        yield row | {"case": f"{setting.name}, {feature}: {row['case']}"}


SECTIONS: dict[str, Callable[[Sizes], list[Case]]] = {
    section.__name__.replace("_", "-"): section
    for section in (
        step_rates,
        attention,
        precision,
        sigreg,
        waits,
        profile,
        memory,
        nccl,
        training,
        colours,
        step_features,
    )
}
