"""Does a recipe train without being tuned? The same settings on several batches, encoders and seeds: collapse, steps that
are no numbers, and the largest jump of the loss from a step to the next. Nothing is clipped, no rate is scaled."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.measure import Row
from benchmarks.race.contest import SCORES, score
from benchmarks.race.runs import Task, trained
from lejepa_scale.errors import UserError
from lejepa_scale.training.collapse import lowest_rank

ENCODERS: Mapping[str, Sequence[str]] = {
    "ResNet": ["model.encoder=resnet10t", "model.options={channels: [32, 64, 128, 256], stem_width: 16}"],
    "ViT": ["model.encoder=vit_nano", "model.options={}", "model.patch_size=4"],
    "ConvNeXt": [
        "model.encoder=convnext_atto",
        "model.options={depths: [1, 1, 2, 1], dims: [32, 64, 128, 256], patch_size: 2}",
    ],
}


@dataclass(frozen=True)
class Study:
    """A recipe, its labelled shards, and what is varied: `images` that every run sees. threads: of each run."""

    recipe: Path
    overrides: tuple[str, ...]
    train: str
    test: str
    images: int
    encoders: tuple[str, ...]
    batches: tuple[int, ...]
    seeds: tuple[int, ...]
    threads: int


def measure(study: Study) -> Iterator[Row]:
    """A row for each encoder, batch and seed. Raises UserError for an encoder that there is not."""
    if unknown := [name for name in study.encoders if name not in ENCODERS]:
        raise UserError(f"{unknown[0]} is none of the encoders: {', '.join(ENCODERS)}.")
    for seed in study.seeds:  # a study that is cut short has seen every encoder and batch
        for name in study.encoders:
            for batch in study.batches:
                yield {"case": name, "batch": batch, "seed": seed, **_run(study, name, batch, seed)}


def _run(study: Study, name: str, batch: int, seed: int) -> Row:
    words = (*study.overrides, *ENCODERS[name], f"train.global_batch={batch}", f"data.shards={study.train}")
    task, steps = Task("ours", study.recipe, words, study.threads), max(8, round(study.images / batch))
    config = task.config()
    if config.optim.clip_norm is not None:
        raise UserError(f"{study.recipe} clips gradients (optim.clip_norm): give optim.clip_norm=null.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "run")
        rows = trained(task, folder, steps, seed, ["log.every=1", f"checkpoint.every={steps}"])
        scores = score(task, folder, steps, study.train, study.test, SCORES[:1])
    return {"steps": steps} | described(rows, lowest_rank(config, batch), config.evaluation.std_floor) | scores


def described(records: Sequence[Mapping[str, Any]], lowest: float, smallest: float) -> Row:
    """Of a run's metrics, one record a step: `lowest` and `smallest` are the effective rank and the deviation below which
    embeddings have collapsed. The first tenth of the steps, in which the loss falls from where it began, is left out of the
    jumps."""
    losses = [float(record["loss"]) for record in records]
    jumps = [(later - earlier, number) for number, (earlier, later) in enumerate(pairwise(losses), 2)]
    settled = jumps[len(losses) // 10 :]
    largest, at = max(settled)
    ranks, deviations = ([float(record[name]) for record in records] for name in ("effective_rank", "embedding_std"))
    late = len(records) // 2
    return {
        "loss": statistics.fmean(losses[-max(1, len(losses) // 20) :]),
        "largest jump": largest,
        "at step": at,
        "usual change": statistics.median(abs(change) for change, _ in settled),
        "rank": ranks[-1],
        "collapsed": min(ranks[late:]) < lowest or min(deviations[late:]) < smallest,
        "no numbers": int(records[-1]["nonfinite_steps"]),
    }


def as_table(rows: Sequence[Row]) -> str:
    """Markdown: each encoder and batch, over its seeds."""
    lines = [
        "| encoder | batch | steps | seeds | 20-NN | loss at the end | largest jump of the loss (its step) | usual change | "
        "effective rank | collapsed | steps without numbers |",
        f"|{'---|' * 11}",
    ]
    for key in dict.fromkeys((row["case"], row["batch"]) for row in rows):
        each = [row for row in rows if (row["case"], row["batch"]) == key]
        worst = max(each, key=lambda row: row["largest jump"])
        knn, loss = (_range(row[name] for row in each) for name in ("knn", "loss"))
        lines.append(
            f"| {key[0]} | {key[1]} | {worst['steps']} | {len(each)} | {knn} | {loss} | {worst['largest jump']:.3f} "
            f"({worst['at step']}) | {statistics.median(row['usual change'] for row in each):.3f} | "
            f"{min(row['rank'] for row in each):.1f} | {sum(row['collapsed'] for row in each)} | "
            f"{sum(row['no numbers'] for row in each)} |"
        )  # fmt: skip
    return "\n".join(lines)


def _range(values: Iterable[float]) -> str:
    found = list(values)
    return f"{min(found):.3g} to {max(found):.3g}"
