"""What evaluate and embed write, and what they refuse."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import timm
import torch
from conftest import ROOT, Command
from safetensors.torch import load_file, save_file

from lejepa_scale.cli.main import main
from lejepa_scale.data.evaluation import evaluation_batches, labelled_batches
from lejepa_scale.data.images.photometric import normalize
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation import subjects as opened
from lejepa_scale.evaluation.subjects import subjects

NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights of a model of timm's, which does not say so."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_file(timm.create_model(NAME, num_classes=0, img_size=32, depth=2).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as timm writes it."""
    from timm.models import save_for_hf

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("timm") / "model"
    model = timm.create_model(NAME, num_classes=0, img_size=32, depth=2)
    save_for_hf(model, path, model_args={"img_size": 32, "depth": 2}, safe_serialization=True)
    return path


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open, self.cells = list[str](), list[str]()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.cells.append(data)


def test_a_table_json_csv_and_a_page(
    folder: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(folder), "--train", str(scenes), "--test", str(scenes), "--out", str(tmp_path / "out")]
    words += [
        "--protocols",
        "knn",
        "logistic",
        "linear",
        "few-shot",
        "retrieval",
        "--k",
        "1",
        "5",
        "--linear-steps",
        "20",
    ]
    words += [
        "--features",
        "pooled",
        "cls+patches-2",
        "--shots",
        "2",
        "50%",
        "--draws",
        "3",
        "--no-cache",
        "--no-baselines",
    ]
    assert main([*words, "--image-size", "32"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split("  ")[0] == "encoder"
    assert "100.0% ±" in said[1]  # each image is its own nearest neighbour
    assert len([line for line in said if line.startswith("model ")]) == 2
    found = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert found["sets"] == {"train": {"images": 96}, "test": {"images": 96}}
    assert len(found["results"]) == 2 * (2 + 1 + 1 + 2 + 1 + 1)
    by_protocol = {row["protocol"]: row for row in found["results"]}
    assert by_protocol["logistic"]["settings"].keys() >= {"strength", "standardized", "held_out_accuracy"}
    assert sum(map(sum, by_protocol["knn"]["confusion"])) == 96
    assert by_protocol["few-shot"]["metrics"]["draws"] == 3
    for name, count in (("knn", 4), ("log-regression", 2), ("linear", 2), ("few-shot", 4), ("retrieval", 2)):
        with (tmp_path / f"out/results-{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == count
        assert {row["features"] for row in rows} == {"pooled", "cls+patches-2"}
    page, text = _Text(), (tmp_path / "out/evaluation.html").read_text()
    page.feed(text)
    assert not page.open
    assert "http" not in text
    assert {"logistic", "true \\ guessed", "100.0% ±1.9"} <= set(page.cells)


def test_a_file_of_weights_needs_a_name_and_a_folder_does_not(weights: Path, folder: Path, scenes: Path) -> None:
    from lejepa_scale.conversion import Given

    (named,) = subjects(str(folder))
    assert (named.name, named.image_size, named.pixels.channels) == ("model", 32, 3)
    with pytest.raises(UserError, match="--encoder NAME"):
        subjects(str(weights))
    with pytest.raises(UserError, match=r"another model than model\.encoder=resnet10t"):
        subjects(str(weights), given=Given("resnet10t"))


def test_a_name_of_timms_is_fetched_or_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    created = timm.create_model

    def offline(name: str, pretrained: bool = False, **arguments: object) -> torch.nn.Module:
        if pretrained:
            raise OSError("no network\nat all")
        return created(name, **arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(opened.timm, "create_model", offline)
    with pytest.raises(UserError, match=rf"not to be had \(no network\).*evaluate FILE --encoder {NAME}"):
        subjects(f"timm:{NAME}")
    with pytest.raises(UserError, match=r"knows no model 'vit_none'"):
        subjects("timm:vit_none")
    monkeypatch.setattr(opened.timm, "create_model", lambda name, pretrained=False, **given: created(name, **given))
    (named,) = subjects(NAME)
    assert (named.name, named.where, named.image_size, named.before_classifier) == (NAME, f"timm:{NAME}", 224, True)
    plain = created(NAME, num_classes=0).eval()
    assert named.build().state_dict().keys() == plain.state_dict().keys()


def test_embed_writes_what_the_encoder_gives(folder: Path, scenes: Path, tmp_path: Path) -> None:
    words = ["embed", str(folder), "--images", str(scenes), "--features", "pooled", "patches", "--no-cache"]
    words += ["--image-size", "32", "--batch", "40"]
    out = tmp_path / "new/f.safetensors"
    assert main([*words, "--out", str(out)]) == 0
    found = load_file(out)
    (named,) = subjects(str(folder), image_size=32)
    (images, labels), *_ = evaluation_batches(str(scenes), image_size=32, batch_size=96, pixels=named.pixels)
    model = named.build()
    with torch.no_grad():
        tokens = model.forward_features(normalize(images, named.pixels))
        torch.testing.assert_close(found["pooled"], model.forward_head(tokens), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["patches"], tokens[:, 1:].mean(1), rtol=1e-4, atol=1e-5)
    assert torch.equal(found["labels"], labels)
    (batch,) = labelled_batches(str(scenes), image_size=32, batch_size=96)
    assert bytes(found["keys"].numpy()).decode().splitlines() == batch.keys
    assert main([*words, "--out", str(out)]) == 2  # it is there
    assert main([*words, "--out", str(out), "--overwrite"]) == 0
    assert main([*words, "--out", str(tmp_path / "f.csv")]) == 2


def test_embed_as_parquet(folder: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["embed", str(folder), "--images", str(scenes), "--no-cache", "--image-size", "32"]
    out = tmp_path / "f.parquet"
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        assert main([*words, "--out", str(out)]) == 2
        assert "pip install pyarrow" in capsys.readouterr().err
        return
    assert main([*words, "--out", str(out)]) == 0
    table = parquet.read_table(out)
    assert table.column_names == ["key", "label", "pooled"]
    assert len(table) == 96


def test_under_torchrun_the_numbers_are_the_same(folder: Path, scenes: Path, tmp_path: Path, command: Command) -> None:
    words = [folder, "--train", scenes, "--test", scenes, "--image-size", "32", "--no-cache", "--no-baselines"]
    of = []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}"
        result = command(ROOT / "tools/evaluate.py", *words, "--out", out, ranks=ranks)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("encoder") == 1
        of.append(json.loads((out / "evaluation.json").read_text())["results"])
    for a, b in zip(*of, strict=True):
        assert a["metrics"] == pytest.approx(b["metrics"], rel=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--protocols", "svm"], "--protocols svm is none of knn"),
        (["--features", "cls-9"], "this VisionTransformer has 2 block(s), not 9"),
        (["--k", "200"], "200"),
        (["--image-size", "40"], "the encoder refuses images of 40 x 40 pixels"),
    ],
)
def test_bad_requests_are_refused(
    folder: Path, scenes: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["evaluate", str(folder), "--train", str(scenes), "--test", str(scenes), "--no-cache", "--image-size", "32"]
    assert main([*start, *words]) == 2
    assert message in capsys.readouterr().err
