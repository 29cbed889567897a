"""Optimizer steps as the trainer takes them: their rate, MFU, memory, phases and collectives, and what each feature of them
is worth against the form without it. Under a launcher every rank runs the same rows; what they say is rank 0's."""

from __future__ import annotations

import gc
import platform
import resource
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.features import FEATURES, Form, compute_dtype, forms
from benchmarks.measure import Results, Row, Work, interleaved, matmul_flops, matrix_product, peak_bytes, run_sections
from benchmarks.trace import breakdown
from benchmarks.trial import CHECKED, MakeViews, Recipe, Sums, Trial, synthetic_views
from lejepa_scale import distributed
from lejepa_scale.config import BatchPlan, Config, check_world
from lejepa_scale.data import Batch, Loader, ahead, open_sources
from lejepa_scale.errors import UserError
from lejepa_scale.model import build, check
from lejepa_scale.planning import peak_flops, step_flops

MODES = ("synthetic", "loader", "end-to-end")
_WARM = 3  # rounds that `interleaved` throws away


@dataclass(frozen=True)
class Options:
    mode: str = "synthetic"
    compare: tuple[str, ...] = ()
    steps: int = 10  # timed ones, after those that warm up
    trace: Path | None = None
    apart: bool = False
    minimal: bool = False


def check_request(recipe: Recipe, options: Options, ranks: int) -> None:
    """Everything that can be wrong before a process is started; raises UserError."""
    config = recipe.config()
    check_world(config, ranks)
    check(config)
    for feature in options.compare:
        forms(feature, config)
    if options.mode != "synthetic" and (options.compare or options.minimal):
        raise UserError(f"comparisons are of steps on views that lie on the device: leave out --mode {options.mode}.")
    if options.mode == "loader" and options.trace is not None:
        raise UserError("--profile is of steps, and --mode loader takes none; use --mode end-to-end.")


def measure(recipe: Recipe, options: Options) -> Results:
    """All that is asked for, on every rank of the launcher's world. Raises UserError."""
    config = recipe.config()
    device = distributed.start(timedelta(minutes=config.engine.timeout_minutes))
    sections: dict[str, Iterator[Row]] = {}
    if options.mode == "loader":
        sections["loader"] = loader_rates(config, device, options.steps)
    elif options.mode == "end-to-end":
        sections["end to end"] = end_to_end(recipe, device, options)
    else:
        sections["step"] = step_rates(recipe, device, options)
    for feature in options.compare:
        sections[feature] = compare(recipe, feature, device, options.steps, apart=options.apart)
    if options.minimal:
        from benchmarks import minimal

        target = minimal.TARGET if recipe.path.stem == "quickstart" else None  # what was promised of that recipe alone
        sections["against minimal"] = minimal.against(recipe.path, recipe.overrides, options.steps, target=target)
    try:
        return run_sections(sections, device, minutes=1e6)  # ranks must not disagree on what the time reaches
    finally:
        distributed.stop()


def step_rates(recipe: Recipe, device: torch.device, options: Options) -> Iterator[Row]:
    """Steps on views that lie on the device already: what the input pipeline has to keep up with."""
    trial = Trial(recipe.config(), device)
    seconds = _timed({"": trial}, device, options.steps)[""]
    yield rates(trial, seconds) | memory(trial, whole_process=not options.compare)
    yield from collectives(trial)
    if options.trace is not None:
        yield from breakdown(trial, lambda: trial.step(trial.synthetic()), options.trace)


def alone(recipe: Recipe, device: torch.device, rounds: int) -> Row:
    """A recipe's rates and memory; an engine that does not fit says so."""
    try:
        trial = Trial(recipe.config(), device)
        row = rates(trial, _timed({"": trial}, device, rounds)[""]) | memory(trial)
    except torch.OutOfMemoryError as error:
        row = {"case": f"{recipe.config().model.encoder}", "cannot run": str(error).split(". ")[0]}
    trial = None  # type: ignore[assignment]
    _free(device)
    return row


def rates(trial: Trial, seconds: dict[str, float]) -> Row:
    """seconds: of a step, under "step", and of its phases; under "product" the FLOP/s of a matrix product."""
    seconds = dict(seconds)
    product = seconds.pop("product", 0.0)
    config, plan, device = trial.config, trial.plan, trial.device
    images, spent = config.train.global_batch, seconds["step"]
    row: Row = {
        "case": f"{config.model.encoder}, {config.engine.name}, {config.engine.precision}, "
        f"{plan.micro_batch} x {plan.ranks} ranks x {plan.accumulation}",
        "ms": 1e3 * spent,
        "images/s": images / spent,
    }
    tokens = tokens_per_image(config)
    if tokens:
        row["tokens/s"] = images * tokens / spent
    achieved = flops_of_a_rank(config, plan) / spent
    peak = peak_flops(device)
    row["TFLOP/s a rank"] = achieved / 1e12
    row["MFU"] = achieved / peak if peak else "not measured: no peak known for this device"
    if not product:  # steps were not timed in turns with one
        product = matmul_flops(device, compute_dtype(config))
    row["MFU of a matrix product here"] = achieved / product
    row["matrix product TFLOP/s"] = product / 1e12
    return row | {f"{name} ms": 1e3 * s for name, s in seconds.items() if name != "step"}


_product = lru_cache(matrix_product)  # chosen once for each precision


def flops_of_a_rank(config: Config, plan: BatchPlan) -> float:
    """Floating-point operations of a training step, without what is computed twice."""
    return step_flops(config, plan).total


def tokens_per_image(config: Config) -> int | None:
    """Tokens that enter the blocks, over all views of an image; None for encoders without patches."""
    with torch.device("meta"):
        encoder = build(config).encoder
    patch = encoder.patch_size
    if patch is None:
        return None
    groups = (config.data.views.global_, config.data.views.local)
    return sum(g.count * ((g.size // patch) ** 2 + encoder.backbone.num_prefix_tokens) for g in groups)


def memory(trial: Trial, *, whole_process: bool = False) -> Row:
    """Peak of a step: above what is kept between steps, and on CUDA in all; of a CPU process, what the system saw."""
    working = peak_bytes(lambda: trial.step(trial.synthetic()), trial.device)
    row: Row = {"working MiB": working / 2**20}
    if trial.device.type == "cuda":
        row["peak MiB"] = (trial.held + working) / 2**20
    elif whole_process:
        unit = 1 if platform.system() == "Darwin" else 1024
        row["peak resident MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    return row


def collectives(trial: Trial) -> Iterator[Row]:
    """What a rank hands to collectives in a step, counted as they are called."""
    if distributed.world_size() > 1:
        yield {"case": "collectives of a step"} | _collectives(trial)


def _collectives(trial: Trial) -> Row:
    with distributed.CountBytes() as counted:
        trial.step(trial.synthetic())
    calls, sizes = Counter[str](), Counter[str]()
    for name, size in counted.calls:
        kind = name.removesuffix("_base")
        calls[kind] += 1
        sizes[kind] += size
    row: Row = {"collectives": calls.total(), "MB": sizes.total() / 1e6}
    return row | {k: v for kind in calls for k, v in ((kind, calls[kind]), (f"{kind} MB", sizes[kind] / 1e6))}


def compare(recipe: Recipe, feature: str, device: torch.device, rounds: int, *, apart: bool = False) -> Iterator[Row]:
    """The base and each other form of a feature, pair by pair in turns; a row for each form."""
    base_name, others = forms(feature, recipe.config())
    base, said = Form(base_name), False
    _free(device)
    for form in others:
        try:
            row = _pair(recipe, base, form, device, rounds, apart)
        except UserError as reason:
            yield {"case": form.name, "cannot run": str(reason)}
            continue
        described = row.pop("base")
        if not said:
            yield {"case": f"{base.name} (as configured)"} | described
            said = True
        yield row


def _pair(recipe: Recipe, base: Form, form: Form, device: torch.device, rounds: int, apart: bool) -> Row:
    """The row of `form`, with that of the base under "base"."""
    configs = {f.name: recipe.config(*f.overrides) for f in (base, form)}
    found: dict[str, Row] = {}
    engines = [config.engine for config in configs.values()]
    # one budget for all that a process compiles, and graphs are shared between engines
    budget = all(e.compile for e in engines) and any(e.activation_checkpointing == "budget" for e in engines)
    apart |= budget
    if not apart:
        try:
            trials = {f.name: Trial(configs[f.name], device, f, shared=True) for f in (base, form)}
            times = _timed(trials, device, rounds)
            found = {name: _facts(trial, times[name]) for name, trial in trials.items()}
        except torch.OutOfMemoryError:
            if distributed.world_size() > 1:
                raise UserError(
                    "two forms do not fit the device at once: add --apart to measure them one by one."
                ) from None
            apart = True
        trials = {}
        _free(device)
    if apart:
        for f in (base, form):
            if budget:
                torch.compiler.reset()
            trial = Trial(configs[f.name], device, f, shared=True)
            found[f.name] = _facts(trial, _timed({f.name: trial}, device, rounds)[f.name])
            del trial
            _free(device)
        if budget:
            torch.compiler.reset()
    ours, theirs = found[form.name], found[base.name]
    firsts = [facts.pop("first steps") for facts in (ours, theirs)]
    row: Row = {"case": form.name, "times the base's ms": ours["ms"] / theirs["ms"]}
    if device.type == "cpu":
        row["times its CPU ms"] = ours["CPU ms"] / theirs["CPU ms"]
    row |= ours
    row |= _agreement(firsts[0], firsts[1], form, configs[form.name])
    if apart:
        row["measured"] = "one after the other"
    return row | {"base": theirs}


def _facts(trial: Trial, seconds: dict[str, float]) -> Row:
    row = rates(trial, seconds) | memory(trial)
    del row["case"]
    if distributed.world_size() > 1:
        row |= _collectives(trial)
    return row | {"first steps": trial.first}


def _agreement(ours: list[Sums], theirs: list[Sums], form: Form, config: Config) -> Row:
    """Relative differences of the first steps, and a verdict where there should be none but rounding. That of the first
    step is not amplified yet; the later ones have seen the optimizer, which makes full steps of rounding noise."""
    differ = [[abs(a / b - 1) for a, b in zip(x, y, strict=True)] for x, y in zip(ours, theirs, strict=True)]
    row: Row = {
        "loss differs by": differ[0][0],
        "gradient norm differs by": differ[0][1],
        f"losses of {CHECKED} steps differ by": max(loss for loss, _ in differ),
    }
    if form.equal:
        limits = (1e-5, 1e-4, 1e-3) if compute_dtype(config) == torch.float32 else (2e-2, 5e-2, 5e-2)
        row["ok"] = all(value < limit for value, limit in zip(row.values(), limits, strict=True))
    return row


def _timed(trials: dict[str, Trial], device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of a step ("step") and of its phases, for each of the trials, in turns with one another and with the
    matrix product of their precision, whose FLOP/s are under "product"."""
    phases: dict[str, list[dict[str, float]]] = {name: [] for name in trials}

    def work(name: str, trial: Trial) -> None:
        before = time.process_time()
        trial.step(trial.synthetic())
        spent = trial.phases.read()
        if device.type == "cpu":  # what others of the machine do falls on this least
            spent["CPU"] = 1e3 * (time.process_time() - before)
        phases[name].append(spent)

    for trial in trials.values():
        trial.phases.read()
    distributed.barrier()
    works: dict[str, Work] = {name: partial(work, name, trial) for name, trial in trials.items()}
    products = {name: _product(device, compute_dtype(trial.config)) for name, trial in trials.items()}
    works |= {f"product of {name}": product for name, (product, _) in products.items()}
    times = interleaved(works, device, rounds)
    out = {}
    for name, found in phases.items():
        out[name] = {phase: median(r[phase] for r in found[_WARM:]) / 1e3 for phase in found[-1]}
        out[name] |= {"step": times[name] / 1e3, "product": 1e3 * products[name][1] / times[f"product of {name}"]}
    return out


def loader_rates(config: Config, device: torch.device, steps: int) -> Iterator[Row]:
    """The loader alone, then with the colours that are applied where training runs."""
    plan = check_world(config, distributed.launched_ranks())
    batches = _batches(config, device)
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


def _batches(config: Config, device: torch.device) -> Iterator[Batch]:
    distributed.on_rank_zero(lambda: open_sources(config.data).num_samples)
    sources = open_sources(config.data, build=False)
    plan = check_world(config, distributed.launched_ranks())
    pin = device.type == "cuda"
    return iter(Loader(sources, config, plan, rank=distributed.rank(), first_step=0, pin_memory=pin))


def end_to_end(recipe: Recipe, device: torch.device, options: Options) -> Iterator[Row]:
    """From shards to updated weights, as train.py goes: nothing waits for a step's end but what waits there too."""
    config = recipe.config()
    trial = Trial(config, device)
    batches = _batches(config, device)
    if trial.plan.accumulation == 1 or config.objective.accumulation != "exact":
        batches = ahead(batches, device)

    def colours(batch: Batch) -> Sequence[Tensor]:
        with trial.phases("colours"):
            return batch.augmented(device)

    def micro_batches() -> Iterator[MakeViews]:
        for _ in range(trial.plan.accumulation):
            with trial.phases("data wait", host=True):
                batch = next(batches)
            yield partial(colours, batch)

    def step() -> None:
        trial.step(micro_batches())

    for _ in range(_WARM + config.data.workers * config.data.prefetch):
        step()
    trial.phases.read()
    started = time.perf_counter()
    for _ in range(options.steps):
        step()
    spent = trial.phases.read()
    seconds = (time.perf_counter() - started) / options.steps
    phases = {name: ms / 1e3 / options.steps for name, ms in spent.items()}
    row = rates(trial, {"step": seconds, **phases})
    row["data wait fraction"] = phases["data wait"] / seconds
    yield row | memory(trial, whole_process=True)
    yield from collectives(trial)
    if options.trace is not None:
        yield from breakdown(trial, step, options.trace)


def largest_batch(recipe: Recipe, device: torch.device, images: int) -> Row:
    """The largest of `images`, twice that, ... whose step fits the device, on one engine."""
    trial = Trial(recipe.of(2).config(), device)
    fits, tried = 0, images
    try:
        while True:
            trial.views = synthetic_views(trial.config, tried, device)
            trial.step(trial.synthetic())
            fits, tried = tried, 2 * tried
    except torch.OutOfMemoryError:
        pass
    case = f"{trial.config.model.encoder}, recomputing {trial.config.engine.activation_checkpointing}: largest batch"
    del trial
    _free(device)
    return {"case": case, "images": fits, "does not fit": tried}


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


__all__ = ["FEATURES", "MODES", "Options", "Recipe", "check_request", "measure", "synthetic_views"]
