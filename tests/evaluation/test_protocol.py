"""evaluate() as a program calls it; the export checked by timm."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_config
from PIL import Image
from ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saving import exported

import lejepa_scale
from lejepa_scale.checkpoint.encoder import load_encoder
from lejepa_scale.checkpoint.saved import Saved
from lejepa_scale.checkpoint.store import find
from lejepa_scale.cli.main import main
from lejepa_scale.config import validate
from lejepa_scale.conversion import compare, open_model
from lejepa_scale.data import Pixels, evaluation_batches
from lejepa_scale.data.images.photometric import normalize
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation import Evaluation, Features, Options, Result, evaluate, knn, measure, work
from lejepa_scale.model import Encoder


@pytest.fixture(scope="module")
def run_dir(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of a small encoder."""
    run = tmp_path_factory.mktemp("run") / "run"
    tree = small_config(run, scenes, train={"steps": 2, "global_batch": 16}, model={"options": {"depth": 1}})
    lejepa_scale.train(validate(tree))
    return run


NEIGHBOURS = Options(("knn",), ks=(3,))


def names(found: Evaluation) -> list[str]:
    return list(dict.fromkeys(row.subject for row in found.results))


def test_a_checkpoint_is_scored_beside_its_beginning_and_raw_pixels(run_dir: Path, scenes: Path) -> None:
    found = evaluate(run_dir, str(scenes), [str(scenes)], options=NEIGHBOURS, batch=40, device="cpu")
    assert names(found) == ["trained", "untrained", "raw pixels"]
    assert [row.width for row in found.results if row.protocol == "knn"] == [128, 128, 3 * 32 * 32]
    encoder, _ = lejepa_scale.load_encoder(run_dir)
    assert found.features.rows.shape == (96, 128)
    (images, _), *_ = evaluation_batches(str(scenes), image_size=32, batch_size=96)
    with torch.no_grad():
        ours = Features(encoder([normalize(images)])[0], found.features.labels)
    torch.testing.assert_close(found.features.rows, ours.rows, rtol=1e-4, atol=1e-5)
    expected = measure(knn(ours, ours, (3,))[3], ours.labels, 10)
    assert found.value("trained", "knn") == expected.top1
    assert found.results[0].metrics["low"] == expected.low
    assert found.sets == {"train": {"images": 96}, "test": {"images": 96}}


def test_an_encoder_is_scored_and_left_as_it_was(scenes: Path) -> None:
    encoder = Encoder("vit_nano", image_size=32, options={"depth": 1}).train()
    with pytest.raises(UserError, match="needs image_size"):
        evaluate(encoder, str(scenes), str(scenes))
    options = Options(("knn",), ks=(1,))
    found = evaluate(encoder, str(scenes), str(scenes), options=options, device="cpu", image_size=16)
    assert names(found) == ["encoder", "raw pixels"]
    assert found.results[-1].width == 3 * 16 * 16  # at the size asked for
    assert found.value("encoder", "knn") == 1.0  # each image is its own nearest neighbour
    assert encoder.training


def test_whatever_holds_the_same_weights_has_the_same_scores(run_dir: Path, scenes: Path, tmp_path: Path) -> None:
    """Of a run, and of what it was converted into: a file, a folder of timm's, one of transformers' own class."""
    for kind in ("safetensors", "timm", "hf"):
        target = tmp_path / (f"{kind}.safetensors" if kind == "safetensors" else kind)
        assert main(["convert", str(run_dir), str(target), "--to", kind]) == 0
    what = [run_dir, *(str(tmp_path / name) for name in ("safetensors.safetensors", "timm", "hf"))]
    options = Options(("knn", "retrieval"), ks=(3,))
    found = evaluate(what, str(scenes), str(scenes), options=options, device="cpu", beside=False)
    assert names(found) == ["run", "safetensors.safetensors", "timm", "hf"]
    (tmp_path / "again").mkdir()
    (tmp_path / "again/timm").symlink_to(tmp_path / "timm")
    two = [str(tmp_path / "timm"), str(tmp_path / "again/timm")]
    both = evaluate(two, str(scenes), str(scenes), options=NEIGHBOURS, device="cpu", beside=False)
    assert len(names(both)) == 2  # told apart by where they lie
    of_each = [[row.metrics for row in found.results if row.subject == name] for name in names(found)]
    assert of_each[1:] == of_each[:1] * 3


def _png(number: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), 40 * number, np.uint8)).save(out, "png")
    return out.getvalue()


def test_features_are_read_again_until_something_differs(run_dir: Path, scenes: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def scored(**more: Any) -> tuple[Evaluation, int]:
        with pytest.MonkeyPatch.context() as patch:
            made = []
            extracted = work.extract
            patch.setattr(work, "extract", lambda *a, **k: made.append(k["name"]) or extracted(*a, **k))
            settings = {"options": NEIGHBOURS, "device": "cpu", "beside": False, "cache": cache, **more}
            return evaluate(run_dir, str(scenes), str(scenes), **settings), len(made)

    first, made = scored()
    assert made == 1  # both sets are the same images
    again, made = scored()
    assert (made, again.results) == (0, first.results)
    assert torch.equal(again.features.rows, first.features.rows)
    for more in ({"image_size": 16}, {"kinds": ["cls"]}, {"weights": "first"}):
        assert scored(**more)[1] == 1, more
    labels = tmp_path / "labels.tar"  # the same images under another label
    with tarfile.open(labels, "w") as tar:
        for number in range(4):
            for ending, data in (
                ("png", _png(number)),
                ("cls", b"%d" % (number % 2)),
                ("other", b"%d" % (number // 2)),
            ):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    for key, expected in ((None, [0, 1, 0, 1]), ("other", [0, 0, 1, 1])):
        settings = {"options": Options(("knn",)), "device": "cpu", "beside": False, "cache": cache, "label_key": key}
        found = evaluate(run_dir, str(labels), str(labels), **settings)  # type: ignore[arg-type]
        assert found.features.labels.tolist() == expected
    scored()
    damaged = max(cache.glob("*pooled*"), key=lambda path: path.stat().st_mtime_ns)
    damaged.write_bytes(damaged.read_bytes()[:-8])
    assert [scored()[1], scored()[1]] == [1, 0]


def _on_ranks(run: str, shards: str) -> list[Result]:
    options = Options(("knn", "logistic", "few-shot", "retrieval"), ks=(3, 7), shots=(1, 3), draws=2)
    return evaluate(run, shards, shards, options=options, kinds=["pooled", "cls"], batch=10, beside=False).results


def test_numbers_do_not_depend_on_how_many_ranks_there_are(run_dir: Path, scenes: Path) -> None:
    """A part of the images each, of which 96 are no multiple of 5 batches of 10; and a part of the protocols."""
    one, *others = (run_ranks(_on_ranks, world, str(run_dir), str(scenes)) for world in (1, 2, 4))
    assert len(one[0]) == 2 * (2 + 1 + 2 + 1 + 1)
    for ranks in others:
        for found in ranks:
            for a, b in zip(found, one[0], strict=True):
                assert (a.subject, a.protocol, a.variant, a.confusion) == (
                    b.subject,
                    b.protocol,
                    b.variant,
                    b.confusion,
                )
                assert a.metrics == pytest.approx(b.metrics, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch=0"),
        ({"device": "cdua"}, "device cdua"),
        ({"kinds": ["tokens"]}, "--features tokens is none of"),
        ({"kinds": ["pooled-2"]}, "--features pooled-2 is none of"),
        ({"pixels": Pixels()}, "knows its pixels"),
    ],
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
