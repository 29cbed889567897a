"""lejepa evaluate: scores of encoders on labelled images."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from lejepa_scale.cli.command import Command, ranges
from lejepa_scale.cli.encoders import add_encoders, cache_of, ranks_of_a_launcher

_DESCRIPTION = """  lejepa evaluate runs/quickstart --train data/scenes/train --test data/scenes/test
  lejepa evaluate runs/a runs/b timm:vit_small_patch14_dinov2 --train SHARDS --test SHARDS --out scores
  torchrun --nproc-per-node 8 -m lejepa_scale evaluate runs/a --train SHARDS --test SHARDS --protocols knn logistic linear

WHAT is a run directory or a checkpoint, also in a store (s3://...); a folder or file that `lejepa convert` wrote; a folder
of timm's or transformers'; timm:NAME, whose weights timm fetches; or a file of weights, with --encoder NAME. The sets are
shards or folders of images with a folder for each class.

Prints a table: every encoder by every protocol, of one run beside the weights that it began with and raw pixels. Writes all
numbers, and how each was made, into --out: evaluation.json, results-PROTOCOL.csv, and evaluation.html, a page that needs
nothing else. Under torchrun every rank encodes a part of the images; the numbers are the same."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="+", metavar="WHAT", help="encoders: see above")
    parser.add_argument(
        "--train", nargs="+", required=True, help="labelled shards (folder, files, brace patterns) or images"
    )
    parser.add_argument("--test", nargs="+", required=True)
    add_encoders(parser)
    parser.add_argument(
        "--protocols",
        nargs="+",
        default=["knn", "logistic"],
        help="knn logistic linear few-shot retrieval; the first two",
    )
    parser.add_argument(
        "--k", nargs="+", type=int, help="neighbours; default: 10 20 100 200, as far as there are images"
    )
    parser.add_argument("--temperature", type=float, default=0.07, help="of k-NN's votes; %(default)s")
    parser.add_argument("--standardize", action="store_true", help="logistic: divide features by their deviation first")
    parser.add_argument("--linear-steps", type=int, help="linear: SGD steps; default: 12,500 as in dinov2 and dinov3")
    parser.add_argument(
        "--linear-norm", choices=["none", "batch", "layer"], default="none",
        help="linear: before the classifiers; LeJEPA's probe is --features cls-2 --linear-norm layer",
    )  # fmt: skip
    parser.add_argument(
        "--shots", nargs="+", type=_shot, help="few-shot: images a class, or percent as 1%%; default: 1 5 10 1%% 10%%"
    )
    parser.add_argument("--draws", type=int, default=5, help="few-shot: of each size; %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of what is held out, of the draws and of SGD; %(default)s")
    parser.add_argument("--no-baselines", action="store_true", help="neither raw pixels nor a run's first weights")
    parser.add_argument("--isotropy", action="store_true", help="one-dimensional tests of normality of the features")
    parser.add_argument("--out", type=Path, help="folder for the numbers; default: the run's, else evaluation")
    parser.add_argument("--json", type=Path, help="evaluation.json alone, there")


def _shot(text: str) -> int | float:
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is neither a number of images nor a percentage such as 10%") from None


def _run(a: argparse.Namespace) -> int:
    from lejepa_scale.conversion import Given
    from lejepa_scale.evaluation import Options, as_table, evaluate, isotropy, isotropy_table, report
    from lejepa_scale.parallel.process_group import rank

    options = Options(
        protocols=tuple(a.protocols),
        ks=None if a.k is None else tuple(a.k),
        temperature=a.temperature,
        standardize=a.standardize,
        linear_steps=a.linear_steps,
        linear_norm=a.linear_norm,
        shots=None if a.shots is None else tuple(a.shots),
        draws=a.draws,
        seed=a.seed,
    )
    with ranks_of_a_launcher() as device:
        found = evaluate(
            a.what,
            a.train,
            a.test,
            kinds=a.features,
            options=options,
            batch=a.batch,
            device=a.device or device,
            image_size=a.image_size,
            given=Given(a.encoder, a.image_size),
            weights=a.weights,
            value_range=ranges(a.range),
            image_key=a.image_key,
            label_key=a.label_key,
            beside=not a.no_baselines,
            cache=cache_of(a),
        )
        if rank() != 0:
            return 0
    command = shlex.join(["lejepa", "evaluate", *sys.argv[2:]])
    print(as_table(found))
    if a.isotropy:
        print("\n" + isotropy_table(isotropy(found.features.rows)))
    if a.json:
        a.json.write_text(report.as_json(found, command))
        print(f"numbers: {a.json}")
        return 0
    for path in report.write(found, a.out or _out(a.what), command)[:2]:
        print(f"{'page' if path.suffix == '.html' else 'numbers'}: {path}")
    return 0


def _out(what: list[str]) -> Path:
    """The folder of the one run, or of its checkpoint, if it is a local one."""
    from lejepa_scale.conversion.source import is_encoder

    path = Path(what[0])
    return path if len(what) == 1 and path.is_dir() and not is_encoder(path) else Path("evaluation")


COMMAND = Command("evaluate", "score encoders on labelled images", _DESCRIPTION, _add_arguments, _run)
