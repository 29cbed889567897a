"""Optimizer steps as the trainer takes them: their rate, MFU, memory, phases and collectives, and what each feature of them
is worth against the form without it. Under a launcher every rank runs the same rows; what they say is rank 0's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from benchmarks import against_minimal
from benchmarks.compare import compare
from benchmarks.features import forms
from benchmarks.fed import end_to_end, loader_rates
from benchmarks.measure import Results, Row, run_sections
from benchmarks.rates import collective_rows, free, memory, rates, timed
from benchmarks.trace import breakdown
from benchmarks.trial import Recipe, Trial, synthetic_views
from lejepa_scale.config import check_world
from lejepa_scale.cost import describe
from lejepa_scale.errors import UserError
from lejepa_scale.model import check
from lejepa_scale.parallel import process_group

MODES = ("synthetic", "loader", "end-to-end")


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
    device = process_group.join(timedelta(minutes=config.engine.timeout_minutes))
    sections: dict[str, Iterator[Row]] = {}
    if options.mode == "loader":
        sections["loader"] = loader_rates(config, device, options.steps)
    elif options.mode == "end-to-end":
        sections["end to end"] = end_to_end(config, device, options.steps, options.trace)
    else:
        sections["step"] = step_rates(recipe, device, options)
    for feature in options.compare:
        sections[feature] = compare(recipe, feature, device, options.steps, apart=options.apart)
    if options.minimal:
        target = (
            against_minimal.TARGET if recipe.path.stem == "quickstart" else None
        )  # what was promised of that recipe alone
        sections["against minimal"] = against_minimal.against(
            recipe.path, recipe.overrides, options.steps, target=target
        )
    try:
        return run_sections(sections, device, minutes=1e6)  # ranks must not disagree on what the time reaches
    finally:
        process_group.leave()


def step_rates(recipe: Recipe, device: torch.device, options: Options) -> Iterator[Row]:
    """Steps on views that lie on the device already: what the input pipeline has to keep up with."""
    trial = Trial(recipe.config(), device)
    seconds = timed({"": trial}, device, options.steps)[""]
    yield rates(trial, seconds) | memory(trial, whole_process=not options.compare)
    yield {"case": "by formula"} | describe(trial.config, trial.plan.ranks, "cuda" if device.type == "cuda" else "cpu")
    yield from collective_rows(trial)
    if options.trace is not None:
        yield from breakdown(trial, lambda: trial.step(trial.synthetic()), options.trace)


def alone(recipe: Recipe, device: torch.device, rounds: int) -> Row:
    """A recipe's rates and memory; an engine that does not fit says so."""
    try:
        trial = Trial(recipe.config(), device, shared=True)
        row = rates(trial, timed({"": trial}, device, rounds)[""]) | memory(trial)
    except torch.OutOfMemoryError as error:
        row = {"case": f"{recipe.config().model.encoder}", "cannot run": str(error).split(". ")[0]}
    trial = None  # type: ignore[assignment]
    free(device)
    return row


def largest_batch(recipe: Recipe, device: torch.device, images: int) -> Row:
    """The largest of `images`, twice that, ... whose step fits the device, on one engine."""
    trial = Trial(recipe.of(2).config(), device, shared=True)
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
    free(device)
    return {"case": case, "images": fits, "does not fit": tried}
