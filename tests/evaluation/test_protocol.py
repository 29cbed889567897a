"""evaluate() as a program calls it; the export checked by timm; the picture."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import small_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saving import exported

import lejepa_scale
from lejepa_scale.checkpoint.encoder import load_encoder
from lejepa_scale.checkpoint.saved import Saved
from lejepa_scale.checkpoint.store import find
from lejepa_scale.config import validate
from lejepa_scale.conversion import compare, open_model
from lejepa_scale.data import evaluation_batches
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation import evaluate, extract, score
from lejepa_scale.evaluation.picture import draw
from lejepa_scale.model import Encoder


@pytest.fixture(autouse=True)
def _one_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    """How the linear classifier is fitted is tested beside it; five fits on raw pixels take longer than all of this."""
    monkeypatch.setattr("lejepa_scale.evaluation.linear._PENALTIES", (1e-2,))


@pytest.fixture(scope="module")
def run_dir(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of a small encoder."""
    run = tmp_path_factory.mktemp("run") / "run"
    tree = small_config(run, scenes, train={"steps": 2, "global_batch": 16}, model={"options": {"depth": 1}})
    lejepa_scale.train(validate(tree))
    return run


def test_a_checkpoint_is_scored_beside_its_beginning_and_raw_pixels(run_dir: Path, scenes: Path) -> None:
    found = evaluate(run_dir, str(scenes), [str(scenes)], k=3, batch=40, device="cpu")
    assert [row.name for row in found.scores] == ["trained", "untrained", "raw pixels"]
    assert [row.width for row in found.scores] == [128, 128, 3 * 32 * 32]
    encoder, _ = lejepa_scale.load_encoder(run_dir)
    assert found.features.rows.shape == (96, 128)
    batches = list(evaluation_batches(str(scenes), image_size=32, batch_size=40))
    ours = extract(encoder, batches, torch.device("cpu"))
    torch.testing.assert_close(found.features.rows, ours.rows)
    assert found.scores[0] == score("trained", ours, ours, k=3)
    assert found.scores[0] != score("trained", ours, ours, k=96)


def test_an_encoder_is_scored_and_left_as_it_was(scenes: Path) -> None:
    encoder = Encoder("vit_nano", image_size=32, options={"depth": 1}).train()
    with pytest.raises(UserError, match="needs image_size"):
        evaluate(encoder, str(scenes), str(scenes))
    found = evaluate(encoder, str(scenes), str(scenes), k=1, device="cpu", image_size=16)
    assert [row.name for row in found.scores] == ["encoder", "raw pixels"]
    assert found.scores[1].width == 3 * 16 * 16  # at the size asked for
    assert found.scores[0].knn == 1.0  # each image is its own nearest neighbour
    assert encoder.training


@pytest.mark.parametrize(
    ("options", "message"), [({"k": 0}, "k=0"), ({"batch": 0}, "batch=0"), ({"device": "cdua"}, "device cdua")]
)
def test_what_cannot_be_evaluated_is_refused(scenes: Path, options: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(UserError, match=message):
        evaluate(Path("nowhere"), str(scenes), str(scenes), **options)


def test_an_export_with_other_weights_is_refused(run_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "deeper/encoder.safetensors"
    assert exported(run_dir, target).tensors == len(load_file(target))
    model = open_model(str(run_dir))
    assert max(found.pooled for found in compare(model, target, "safetensors", exact=True, dtype=torch.float32)) < 1e-5
    with safe_open(target, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(target)
    tensors["norm.bias"] += 1e-2
    save_file(tensors, target, metadata)
    with pytest.raises(UserError, match=r"pooled [2-5]\.\de-03.* DIFFERS"):  # 1e-2 of features of up to 3
        compare(model, target, "safetensors", exact=True, dtype=torch.float32)
    tensors["norm.bias"] *= torch.nan
    save_file(tensors, target, metadata)
    with pytest.raises(UserError, match=r"pooled nan.* DIFFERS"):
        compare(model, target, "safetensors", exact=True, dtype=torch.float32)


def test_an_encoder_that_is_not_finite_is_refused_by_name(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Saved.whole

    def broken(self: Saved, name: str, kind: str) -> torch.Tensor:
        return whole(self, name, kind) * (torch.nan if name.endswith("backbone.norm.bias") else 1)

    monkeypatch.setattr(Saved, "whole", broken)
    with pytest.raises(UserError, match=r"step_\d+ is broken: .* values of norm\.bias are not finite"):
        load_encoder(run_dir)


def test_an_encoder_that_timm_builds_otherwise_is_refused_by_name(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = Saved(find(run_dir)).shapes
    other = {name: shape for name, shape in shapes.items() if not name.endswith("backbone.norm.bias")}
    other["encoder.backbone.cls_token"] = (1, 1, 1)  # which would spread over all of it
    monkeypatch.setattr(Saved, "shapes", other)
    with pytest.raises(
        UserError, match=r"2 tensors are on one side alone or of another shape \(cls_token, norm\.bias\)"
    ):
        load_encoder(run_dir)


def test_a_picture_shows_every_step_and_image(run_dir: Path, scenes: Path, tmp_path: Path) -> None:
    from PIL import Image

    draw(run_dir, str(scenes), tmp_path / "new/p.png", images=3, size=32)
    with Image.open(tmp_path / "new/p.png") as image:
        assert image.size == (9 * 120, 6 * 120)  # 6 inches of curves and two columns of 1.5, at 120 dots an inch
        assert len(set(image.convert("RGB").resize((90, 60)).getdata())) > 100
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        draw(tmp_path, str(scenes), tmp_path / "q.png")


def test_a_picture_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'lejepa_scale\[report\]'"):
        draw(tmp_path, "x", tmp_path / "p.png")
