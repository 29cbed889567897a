"""lejepa evaluate: scores of a trained encoder."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from lejepa_scale.cli.command import Command, add_keys, add_range, ranges

_DESCRIPTION = """  lejepa evaluate runs/quickstart --train data/scenes/train --test data/scenes/test

Prints a table: the trained encoder beside the untrained one and raw pixels, by nearest neighbours and by a linear
classifier. Writes the numbers as JSON (RUN/evaluation.json unless --json says otherwise). With --isotropy also tests how
Gaussian the trained encoder's features are along random directions."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", help="run directory (its newest checkpoint) or a step directory, or the address of one (s3://...)"
    )
    parser.add_argument("--train", nargs="+", required=True, help="labelled shards: folder, files or brace patterns")
    parser.add_argument("--test", nargs="+", required=True)
    parser.add_argument("--k", type=int, default=20, help="neighbours (default 20)")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    add_range(parser, "that of the run's shards")
    add_keys(parser, "those of the run's shards")
    parser.add_argument("--isotropy", action="store_true", help="one-dimensional tests of normality of the features")
    parser.add_argument("--json", type=Path, help="where the numbers go")


def _run(a: argparse.Namespace) -> int:
    from lejepa_scale.checkpoint.places import place
    from lejepa_scale.evaluation import as_table, evaluate, isotropy, isotropy_table

    found = evaluate(
        a.checkpoint,
        a.train,
        a.test,
        k=a.k,
        batch=a.batch,
        device=a.device,
        value_range=ranges(a.range),
        image_key=a.image_key,
        label_key=a.label_key,
    )
    target = a.json or place(a.checkpoint) / "evaluation.json"
    target.write_text(json.dumps([asdict(row) for row in found.scores], indent=1))
    print(as_table(found.scores))
    if a.isotropy:
        print("\n" + isotropy_table(isotropy(found.features.rows)))
    print(f"numbers: {target}")
    return 0


COMMAND = Command("evaluate", "score an encoder on labelled shards", _DESCRIPTION, _add_arguments, _run)
