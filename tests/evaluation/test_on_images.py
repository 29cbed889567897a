"""Protocols on tokens of patches and fine-tuning, as `lejepa evaluate` runs them: what they write, what they refuse, on
other numbers of ranks."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from masked import masked, png
from ranks import run_ranks
from tars import shard

from lejepa_scale.cli.main import main
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation import Options, Result, evaluate, suite
from lejepa_scale.evaluation.finetune import FinetuneRecipe
from lejepa_scale.evaluation.protocols import ATTENTIVE, ON_IMAGES, PROTOCOLS, SEGMENTATION
from lejepa_scale.evaluation.report import _HOW, FILES

SHORT = Options(
    ("knn", "attentive", "segmentation", "finetune"),
    ks=(3,),
    attentive=replace(ATTENTIVE, learning_rates=(1e-3, 1e-2), steps=20, batch=16),
    segmentation=replace(SEGMENTATION, learning_rates=(1e-2, 1e-1), steps=20),
    finetune=FinetuneRecipe((1e-3, 5e-3), epochs=1, batch=16),
)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("masked")
    return masked(folder / "train/s.tar", 41, labelled=True), masked(folder / "test/s.tar", 23, 1000, labelled=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model as timm writes it."""
    from timm.models import save_for_hf

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("timm") / "model"
    arguments = {"img_size": 32, "depth": 2, "patch_size": 8, "embed_dim": 96}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
    save_for_hf(model, path, model_args=arguments, safe_serialization=True)
    return path


def has(row: dict[str, Any], **settings: Any) -> bool:
    return {name: row["settings"][name] for name in settings} == settings


def test_everything_is_in_the_table_the_files_and_the_page(
    sets: tuple[str, str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["evaluate", str(folder), "--train", sets[0], "--test", sets[1], "--out", str(out), "--image-size", "32"]
    words += [
        "--protocols",
        "finetune",
        "attentive",
        "knn",
        "segmentation",
        "--k",
        "3",
        "--no-baselines",
        "--seed",
        "7",
    ]
    words += ["--cache", str(tmp_path / "cache"), "--attentive-steps", "5", "--segmentation-steps", "5"]
    words += ["--segmentation-norm", "none", "--mask-classes", "4", "--finetune-epochs", "1", "--finetune-lr", "1e-3"]
    words += [
        "--finetune-layer-decay",
        "0.5",
        "--finetune-smoothing",
        "0",
        "--finetune-crop",
        "1",
        "--finetune-flip",
        "0",
    ]
    words += ["--finetune-drop-path", "0", "--finetune-batch", "8", "--finetune-weight-decay", "0.01"]
    assert main(words) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[2:] == ["3-NN", "eff.", "rank", "finetune", "attentive", "mIoU", "pixel", "acc.", "width"]
    assert [line.split()[:2] for line in table[1:3]] == [["model", "pooled"], ["model", "patches"]]
    found = json.loads((out / "evaluation.json").read_text())
    assert found["sets"] == {"train": {"images": 41}, "test": {"images": 23}}
    rows = {row["protocol"]: row for row in found["results"]}
    for name in ("attentive", "finetune"):
        assert rows[name]["metrics"]["low"] < rows[name]["metrics"]["top1"] < rows[name]["metrics"]["high"]
        assert sum(map(sum, rows[name]["confusion"])) == 23
        assert has(rows[name], train_images=41, test_images=23, seed=7)
    assert has(rows["attentive"], steps=5, tokens=16, attention_heads=2)
    assert has(rows["segmentation"], steps=5, classes=4, norm="none", seed=7)
    assert len(rows["segmentation"]["confusion"]) == 4
    said = {"epochs": 1, "learning_rate": 1e-3, "layer_decay": 0.5, "label_smoothing": 0.0, "crop": 1.0, "flip": 0.0}
    said |= {"drop_path": 0.0, "batch": 8, "steps": 5, "weight_decay": 0.01}
    assert has(rows["finetune"], **said)
    for name, metric in (("attentive", "top1"), ("finetune", "top1"), ("semantic-segmentation", "miou")):
        with (out / f"results-{name}.csv").open() as file:
            (row,) = csv.DictReader(file)
        assert float(row[metric]) == rows[row["protocol"]]["metrics"][metric]
        assert row["setting train_images"] == "41"
    page = (out / "evaluation.html").read_text()
    assert "model, patches, segmentation" in page
    assert page.count("<th>green</th>") == 3 * 2  # in the header and the column of three tables of classes
    assert page.count("<th>0</th>") == 2  # masks have numbers
    assert all(f"<b>{name}</b>" in page for name in ON_IMAGES)
    assert not list((tmp_path / "cache").glob("tokens*"))


def test_every_protocol_has_a_file_and_says_how() -> None:
    assert set(FILES) == set(PROTOCOLS)
    assert set(_HOW) == {*PROTOCOLS, "spectrum"}


def _on_ranks(what: str, train: str, test: str) -> list[Result]:
    return evaluate(what, train, test, options=SHORT, batch=6, image_size=32, device="cpu").results


@pytest.mark.slow
def test_numbers_do_not_depend_on_how_many_ranks_there_are(sets: tuple[str, str], folder: Path) -> None:
    one = _on_ranks(str(folder), *sets)
    assert [row.protocol for row in one[:5]] == ["knn", "spectrum", "attentive", "segmentation", "finetune"]
    for world in (2, 4):
        for found in run_ranks(_on_ranks, world, str(folder), *sets):
            for a, b in zip(found, one, strict=True):
                assert (a.subject, a.protocol, a.width) == (b.subject, b.protocol, b.width)
                assert a.metrics == pytest.approx(b.metrics, rel=1e-3), a.protocol
                assert a.settings.keys() == b.settings.keys()


def test_masks_alone_are_enough_for_segmentation(folder: Path, tmp_path: Path) -> None:
    """Shards without a label; other protocols say what is missing."""
    path = masked(tmp_path / "s.tar", 12)
    alone = replace(SHORT, protocols=("segmentation",))
    found = evaluate(str(folder), path, path, options=alone, image_size=32, device="cpu")
    assert [row.protocol for row in found.results] == ["segmentation"]
    assert found.sets == {"train": {"images": 12}, "test": {"images": 12}}
    assert (
        main(["evaluate", str(folder), "--train", path, "--test", path, "--protocols", "segmentation", "--isotropy"])
        == 2
    )
    for protocol in ("knn", "attentive", "finetune"):
        with pytest.raises(UserError, match="12 of 12 evaluation images have no label"):
            evaluate(
                str(folder), path, path, options=replace(SHORT, protocols=(protocol,)), image_size=32, device="cpu"
            )


@pytest.mark.parametrize("label", ["[1, 3]", "1,3", "1 3", "4;5;6", '["cat"]'])
def test_several_labels_an_image_are_refused(label: str, folder: Path, tmp_path: Path) -> None:
    members = {}
    for number in range(4):
        members |= {f"{number}.png": png(np.zeros((32, 32, 3), np.uint8)), f"{number}.cls": label.encode()}
    path = shard(tmp_path / "s.tar", members)
    with pytest.raises(UserError, match=r"the label '.*' holds several classes.*\(multi-label\) cannot be scored"):
        evaluate(str(folder), path, path, options=replace(SHORT, protocols=("finetune",)), image_size=32)
    members = {name: b'{"classes": [1, 3]}' if name.endswith("cls") else data for name, data in members.items()}
    path = shard(tmp_path / "j.tar", {name.replace("cls", "json"): data for name, data in members.items()})
    with pytest.raises(UserError, match=r"json holds .*\[1, 3\].*, not a class number or name at classes"):
        evaluate(str(folder), path, path, options=SHORT, label_key="json:classes", image_size=32)


@pytest.mark.parametrize("label", ["label 1, 3", "2-1", "10", "n01440764", "a b"])
def test_names_are_no_lists(label: str) -> None:
    assert suite._SEVERAL.fullmatch(label) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["attentive", "--disk-limit", "0.000001"],
            "(16 tokens x 96 x 2 bytes an image), more than --disk-limit 1e-06.",
        ),
        (["segmentation", "--disk-limit", "1e-6"], "(16 tokens x 96 x 2 bytes + 32 x 32 of its mask an image)"),
        (["segmentation", "--mask-key", "seg.png"], "KEY.jpg and KEY.seg.png (--mask-key names another ending)"),
        (["segmentation", "--mask-classes", "2"], "ids are 0..1, and 255 is no class"),
        (["segmentation", "--mask-classes", "400"], "--mask-classes is from 2 to 255, not 400"),
        (["attentive", "--attentive-steps", "0"], "steps=0"),
        (["finetune", "--finetune-lr", "-1"], "learning rates above 0"),
        (["attentive", "--image-size", "44"], "the encoder refuses images of 44 x 44 pixels, or has no patch features"),
    ],
)
def test_bad_requests_are_refused(
    sets: tuple[str, str], folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["evaluate", str(folder), "--train", sets[0], "--test", sets[1], "--no-cache", "--image-size", "32"]
    assert main([*start, "--protocols", *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_features_that_are_no_numbers_are_refused(sets: tuple[str, str], folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken: Any = load_file(folder / "model.safetensors")
    broken["norm.weight"] *= torch.nan
    (tmp_path / "m").mkdir()
    save_file(broken, tmp_path / "m/model.safetensors")
    (tmp_path / "m/config.json").write_text((folder / "config.json").read_text())
    tokens = "the tokens of 41 of 41"
    for protocol, message in {"attentive": tokens, "segmentation": tokens, "finetune": "all 1 heads"}.items():
        options = replace(SHORT, protocols=(protocol,), finetune=FinetuneRecipe(epochs=1))
        with pytest.raises(UserError, match=message):
            evaluate(str(tmp_path / "m"), *sets, options=options, image_size=32, device="cpu")
