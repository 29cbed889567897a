"""lejepa evaluate: scores of encoders on labelled images."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from lejepa_scale.cli.command import Command, expect_writable, ranges
from lejepa_scale.cli.encoders import add_encoders, cache_of, ranks_of_a_launcher

_DESCRIPTION = """  lejepa evaluate runs/quickstart --train data/scenes/train --test data/scenes/test
  lejepa evaluate runs/a runs/b timm:vit_small_patch14_dinov2 --train SHARDS --test SHARDS --out scores
  torchrun --nproc-per-node 8 -m lejepa_scale evaluate runs/a --train SHARDS --test SHARDS --protocols knn logistic linear
  lejepa evaluate runs/a --train SHARDS --test SHARDS --protocols attentive finetune --finetune-epochs 10
  lejepa evaluate runs/a --train MASKED --test MASKED --protocols segmentation

WHAT is a run directory or a checkpoint, also in a store (s3://...); a folder or file that `lejepa convert` wrote; a folder
of timm's or transformers'; timm:NAME, whose weights timm fetches; or a file of weights, with --encoder NAME. The sets are
shards or folders of images with a folder for each class; for segmentation, shards with a mask beside each image
(KEY.jpg, KEY.mask.png: a class id a pixel, 255 for none).

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
        help="knn logistic linear few-shot retrieval attentive segmentation finetune; the first two",
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
    _add_of_images(parser)
    parser.add_argument("--no-baselines", action="store_true", help="neither raw pixels nor a run's first weights")
    parser.add_argument("--isotropy", action="store_true", help="one-dimensional tests of normality of the features")
    parser.add_argument("--out", type=Path, help="folder for the numbers; default: the run's, else evaluation")
    parser.add_argument("--json", type=Path, help="evaluation.json alone, there")


def _add_of_images(parser: argparse.ArgumentParser) -> None:
    """Of the protocols on tokens of patches, and of fine-tuning."""
    add = parser.add_argument_group("attentive, segmentation, finetune").add_argument
    add("--attentive-steps", type=int, help="attentive: of 1,024 images; default: 12,500 as CAPI's")
    add(
        "--disk-limit", type=float, metavar="GB", default=64.0,
        help="attentive, segmentation: disk for the training images' tokens, of all ranks together; %(default)g",
    )  # fmt: skip
    add("--mask-key", default="mask.png", help="segmentation: ending of the members that are masks; %(default)s")
    add("--mask-classes", type=int, help="segmentation: classes; default: 1 + the largest id of the training masks")
    add("--segmentation-steps", type=int, help="segmentation: of 16 images; default: 4,000")
    add(
        "--segmentation-norm", choices=["batch", "none"], default="batch",
        help="segmentation: standardize features by all training patches first, or not; %(default)s",
    )  # fmt: skip
    add("--finetune-epochs", type=int, help="finetune: default: 30")
    add(
        "--finetune-lr", nargs="+", type=float,
        help="finetune: of a batch of 256; of several the best is chosen, one run for each; default: 5e-4",
    )  # fmt: skip
    add("--finetune-batch", type=int, help="finetune: images of a step, of all ranks; default: 128")
    add("--finetune-layer-decay", type=float, help="finetune: of the learning rate, a layer; default: 0.75")
    add("--finetune-weight-decay", type=float, help="finetune: default: 0.05")
    add("--finetune-smoothing", type=float, help="finetune: of labels; default: 0.1")
    add("--finetune-drop-path", type=float, help="finetune: in the last block; default: 0.1")
    add("--finetune-crop", type=float, help="finetune: least area of a random crop; 1: no crops; default: 0.35")
    add("--finetune-flip", type=float, help="finetune: share of images that are mirrored; default: 0.5")


def _shot(text: str) -> int | float:
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is neither a number of images nor a percentage such as 10%") from None


def _run(a: argparse.Namespace) -> int:
    from lejepa_scale.conversion import Given
    from lejepa_scale.errors import UserError
    from lejepa_scale.evaluation import Options, as_table, evaluate, isotropy, isotropy_table, report
    from lejepa_scale.evaluation.protocols import ON_FEATURES
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
        disk_limit=a.disk_limit,
        mask_key=a.mask_key,
        mask_classes=a.mask_classes,
        segmentation_norm=a.segmentation_norm,
        **_recipes(a),
    )
    if a.isotropy and not set(options.protocols) & ON_FEATURES.keys():
        raise UserError(f"--isotropy tests features: add one of {', '.join(ON_FEATURES)} to --protocols.")
    expect_writable(a.json or (a.out or _out(a.what)) / report.NUMBERS)
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
    if a.isotropy and found.features is not None:
        print("\n" + isotropy_table(isotropy(found.features.rows)))
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(report.as_json(found, command))
        print(f"numbers: {a.json}")
        return 0
    for path in report.write(found, a.out or _out(a.what), command)[:2]:
        print(f"{'page' if path.suffix == '.html' else 'numbers'}: {path}")
    return 0


def _recipes(a: argparse.Namespace) -> dict[str, Any]:
    """As the protocols have them, but for what is given."""
    from lejepa_scale.evaluation.protocols import ATTENTIVE, FINETUNE, SEGMENTATION

    names = {
        "epochs": "epochs",
        "lr": "learning_rates",
        "batch": "batch",
        "smoothing": "label_smoothing",
        "crop": "crop",
    }
    names |= {name: name for name in ("layer_decay", "weight_decay", "drop_path", "flip")}
    given = {field: getattr(a, f"finetune_{name}") for name, field in names.items()}
    if given["learning_rates"] is not None:
        given["learning_rates"] = tuple(given["learning_rates"])
    return {
        "attentive": _but(ATTENTIVE, steps=a.attentive_steps),
        "segmentation": _but(SEGMENTATION, steps=a.segmentation_steps),
        "finetune": _but(FINETUNE, **given),
    }


def _but(recipe: Any, **given: Any) -> Any:
    return replace(recipe, **{name: value for name, value in given.items() if value is not None})


def _out(what: list[str]) -> Path:
    """The folder of the one run, or of its checkpoint, if it is a local one."""
    from lejepa_scale.conversion.source import is_encoder

    path = Path(what[0])
    return path if len(what) == 1 and path.is_dir() and not is_encoder(path) else Path("evaluation")


COMMAND = Command("evaluate", "score encoders on labelled images", _DESCRIPTION, _add_arguments, _run)
