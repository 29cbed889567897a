"""What a feature of the step is worth: the configuration in turns with each other form of the feature."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.features import Form, compute_dtype, forms
from benchmarks.measure import Row
from benchmarks.rates import collective_calls, free, memory, rates, timed
from benchmarks.trial import CHECKED, Recipe, Sums, Trial
from lejepa_scale.config import Config
from lejepa_scale.errors import UserError
from lejepa_scale.parallel import process_group


def compare(recipe: Recipe, feature: str, device: torch.device, rounds: int, *, apart: bool = False) -> Iterator[Row]:
    """The base and each other form of a feature, pair by pair in turns; a row for each form."""
    base_name, others = forms(feature, recipe.config())
    base, said = Form(base_name), False
    free(device)
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
            times = timed(trials, device, rounds)
            found = {name: _facts(trial, times[name]) for name, trial in trials.items()}
        except torch.OutOfMemoryError:
            if process_group.world_size() > 1:
                raise UserError(
                    "two forms do not fit the device at once: add --apart to measure them one by one."
                ) from None
            apart = True
        trials = {}
        free(device)
    if apart:
        for f in (base, form):
            if budget:
                torch.compiler.reset()
            trial = Trial(configs[f.name], device, f, shared=True)
            found[f.name] = _facts(trial, timed({f.name: trial}, device, rounds)[f.name])
            del trial
            free(device)
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
    if process_group.world_size() > 1:
        row |= collective_calls(trial)
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
