"""A selection of runs, for people and for programs. Refuses to rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lejepa_scale.config.keys import as_text, values_of
from lejepa_scale.operations.selection import FEW, SEED, Selection


def as_table(found: Selection) -> str:
    """A line for each run, best first: what sets it apart, its loss, its score, and how sure its place is."""
    names = {key: _short(key, found.differing) for key in found.differing}
    header = ["", *names.values(), "loss", "score", "95 %", "best", "place", "run"]
    rows = [header]
    for number, one in enumerate(found.ranked, 1):
        config = dict(values_of(one.runs[0].config))
        seeds = ", ".join(as_text(run.config.run.seed) for run in one.runs)
        own = [seeds if key == SEED else as_text(config.get(key, "")) for key in names]
        if math.isnan(one.score):
            rows.append(["-", *own, "none", "", "", "", "", one.name])
            continue
        places = "-".join(map(str, dict.fromkeys(one.places)))
        half = f"±{(one.high - one.low) / 2:.2g}"
        rows.append(
            [str(number), *own, f"{one.loss:.4g}", f"{one.score:.4g}", half, f"{one.best:.0%}", places, one.name]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(header) - 1
    return "\n".join(
        "  ".join(cell if i == last else cell.rjust(n) for i, (cell, n) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )


def _short(key: str, keys: Sequence[str]) -> str:
    """Its last part, where no other key has the same."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key


def conclusion(found: Selection) -> str:
    """What the table says, and what it does not."""
    best = found.ranked[0]
    lines = [f"left out: {line}" for line in found.left_out]
    if math.isnan(best.score):
        return "\n".join([*lines, "no run has a finite loss at its end."])
    lines.append(f"{best.name} has the smallest loss / lambda^{found.alpha:g}, in {best.best:.0%} of the resamplings.")
    if found.tied:
        lines.append(f"Not told apart from it: {'; '.join(found.tied)}. Train longer, or with other seeds, to tell.")
    few = [run.name for one in found.ranked for run in one.runs if 0 < len(run.losses) < FEW]
    if few:
        lines.append(
            f"{len(few)} of the runs have fewer than {FEW} records in their last part: the noise of their losses is hardly "
            "known (log.every, or a longer --window)."
        )
    if all(len(one.runs) == 1 for one in found.ranked):
        lines.append(
            "This is the noise of the loss alone; another run.seed may give another order. Runs that differ in run.seed "
            "alone are taken as repeats."
        )
    return "\n".join(lines)


def as_json(found: Selection) -> dict[str, Any]:
    """Everything, for a program."""
    return {
        "alpha": found.alpha,
        "left_out": found.left_out,
        "tied_with_the_best": found.tied,
        "ranked": [
            {
                "runs": [str(run.path) for run in one.runs],
                "lambda": one.runs[0].lam,
                "differs_in": {
                    key: value for key, value in values_of(one.runs[0].config) if key in found.differing and key != SEED
                },
                "loss": _or_none(one.loss),
                "score": _or_none(one.score),
                "interval": [_or_none(one.low), _or_none(one.high)],
                "share_best": one.best,
                "places": list(one.places),
            }
            for one in found.ranked
        ],
    }


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
