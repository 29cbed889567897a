"""The table: a trained encoder beside the untrained one and raw pixels."""

from __future__ import annotations

from dataclasses import dataclass

from lejepa_scale.evaluation.features import Features
from lejepa_scale.evaluation.knn import knn_accuracy
from lejepa_scale.evaluation.linear import linear_accuracy
from lejepa_scale.evaluation.spectrum import effective_rank


@dataclass(frozen=True)
class Scores:
    """Scores of one kind of features; accuracies in 0..1."""

    name: str
    knn: float
    linear: float
    penalty: float
    effective_rank: float
    width: int


def score(name: str, train: Features, test: Features, k: int = 20) -> Scores:
    """k-NN with `k` neighbours, linear accuracy and effective rank of one kind of features, trained on `train`."""
    linear, penalty = linear_accuracy(train, test)
    return Scores(name, knn_accuracy(train, test, k=k), linear, penalty, effective_rank(test.rows), train.rows.shape[1])


def as_table(rows: list[Scores]) -> str:
    """The rows as lines of text, a header first; accuracies in percent."""
    lines = [f"{'features':<20}{'k-NN':>9}{'linear':>9}{'eff. rank':>11}{'width':>8}"]
    for row in rows:
        rank = f"{row.effective_rank:.1f}"
        lines.append(f"{row.name:<20}{row.knn:>8.1%} {row.linear:>8.1%}{rank:>11}{row.width:>8}")
    return "\n".join(lines)
