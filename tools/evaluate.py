"""Score a trained encoder on labelled shards, beside the untrained encoder and raw pixels.

  python tools/evaluate.py runs/quickstart --train data/scenes/train --test data/scenes/test

Prints a table; writes the numbers as JSON (RUN/evaluation.json unless --json says otherwise). With --isotropy also tests
how Gaussian the trained encoder's features are along random directions.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from lejepa_scale.checkpoint import load_encoder
from lejepa_scale.data import evaluation_batches
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation import Features, Scores, as_table, extract, isotropy, isotropy_table, raw_pixels, score
from lejepa_scale.evaluation.features import Batches
from lejepa_scale.model import Encoder


def evaluate(
    checkpoint: Path, train: list[str], test: list[str], k: int, batch: int, device: torch.device
) -> tuple[list[Scores], Features]:
    """The scores of all kinds of features, and the trained encoder's test features."""
    encoder, config = load_encoder(checkpoint)
    untrained, _ = load_encoder(checkpoint, trained=False)

    def batches(shards: list[str]) -> Batches:
        return evaluation_batches(shards, image_size=config.image_size, batch_size=batch)

    def features(name: str, model: Encoder) -> tuple[Features, Features]:
        found = [extract(model, batches(shards), device, name) for shards in (train, test)]
        return found[0], found[1]

    trained = features("trained", encoder)
    rows = [
        score("trained", *trained, k=k),
        score("untrained", *features("untrained", untrained), k=k),
        score("raw pixels", raw_pixels(batches(train)), raw_pixels(batches(test)), k),
    ]
    return rows, trained[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="run directory (its newest checkpoint) or a step directory")
    parser.add_argument("--train", nargs="+", required=True, help="labelled shards: folder, files or brace patterns")
    parser.add_argument("--test", nargs="+", required=True)
    parser.add_argument("--k", type=int, default=20, help="neighbours (default 20)")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--isotropy", action="store_true", help="one-dimensional tests of normality of the features")
    parser.add_argument("--json", type=Path, help="where the numbers go")
    a = parser.parse_args()
    try:
        rows, features = evaluate(a.checkpoint, a.train, a.test, a.k, a.batch, torch.device(a.device))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    target = a.json or a.checkpoint / "evaluation.json"
    target.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    print(as_table(rows))
    if a.isotropy:
        print("\n" + isotropy_table(isotropy(features.rows)))
    print(f"numbers: {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
