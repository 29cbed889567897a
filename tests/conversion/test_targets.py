"""Every target for every family of encoders, read by the libraries it is for: names, precision, preprocessing, remains."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from benchmarks.conversion import FAMILIES, written
from conftest import small_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lejepa_scale.cli.main import main
from lejepa_scale.config import validate
from lejepa_scale.conversion import Given, compare, convert, open_model, verify
from lejepa_scale.conversion.model import outputs
from lejepa_scale.errors import UserError
from lejepa_scale.training import loop

ONNX = ("ViT, class token", "DINOv3 (RoPE), class token", "ResNet")
CLASS_TOKEN = "ViT, class token"


def source(folder: Path, family: str = CLASS_TOKEN) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return written(FAMILIES[family], folder)


def case(family: str, kind: str) -> Any:
    slow = (kind == "onnx" and family not in ONNX) or (kind == "safetensors" and family != CLASS_TOKEN)
    return pytest.param(family, kind, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(
    ("family", "kind"), [case(f, k) for f in FAMILIES for k in ("timm", "hf", "safetensors", "onnx")]
)
def test_features_are_the_sources_by_every_reader(tmp_path: Path, family: str, kind: str) -> None:
    pytest.importorskip({"hf": "transformers", "onnx": "onnxscript"}.get(kind, "timm"))
    expected, target = FAMILIES[family], tmp_path / "target"
    model = open_model(source(tmp_path / "in", family))
    if kind == "hf" and expected.native is None:
        with pytest.raises(UserError, match=r"no class of transformers holds \w+ as it is here: .*`--to timm` writes"):
            convert(model, target, kind)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
        return
    done = convert(model, target, kind)
    found = compare(model, target, kind, exact=done.exact, dtype=torch.float32)
    assert {row.size for row in found} == {row.size for row in found if row.pooled == row.pooled}
    assert len({row.size for row in found}) == 4
    assert done.exact == (kind != "hf" or expected.exact)
    for row in found:
        native = row.size == (expected.size, expected.size)
        if done.exact or native:
            assert max(row.pooled, row.patches or 0.0) < (5e-6 if kind in ("onnx", "hf") else 1e-6)
        else:
            assert row.note
    readers = {row.reader for row in found}
    if kind == "timm":
        assert "timm" in readers
        assert ("transformers" in readers) == (not expected.arguments.get("num_classes"))
    if kind == "hf":
        assert json.loads((target / "config.json").read_text())["architectures"] == [expected.native]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "target"]  # nothing is left beside it


def test_names_are_those_that_transformers_4_57_reads(tmp_path: Path) -> None:
    """5.x renames in memory and reads these too; what it writes itself they are."""
    dinov2, dinov3 = tmp_path / "2", tmp_path / "3"
    convert(open_model(source(tmp_path / "a", "DINOv2")), dinov2, "hf")
    convert(open_model(source(tmp_path / "b", "DINOv3 (RoPE), class token")), dinov3, "hf")
    assert {name for name in load_file(dinov2 / "model.safetensors") if ".layer.0." not in name} == {
        "embeddings.cls_token", "embeddings.mask_token", "embeddings.position_embeddings",
        "layernorm.weight", "layernorm.bias",
        *(f"embeddings.patch_embeddings.projection.{part}" for part in ("weight", "bias")),
        *(f"encoder.layer.1.attention.attention.{name}.{part}" for name in ("query", "key", "value")
          for part in ("weight", "bias")),
        *(f"encoder.layer.1.{name}.{part}" for name in ("attention.output.dense", "norm1", "norm2", "mlp.fc1", "mlp.fc2")
          for part in ("weight", "bias")),
        "encoder.layer.1.layer_scale1.lambda1", "encoder.layer.1.layer_scale2.lambda1",
    }  # fmt: skip
    assert {name for name in load_file(dinov3 / "model.safetensors") if name.startswith("layer.1.attention")} == {
        *(f"layer.1.attention.{name}_proj.weight" for name in "qkvo"), "layer.1.attention.o_proj.bias",
    }  # fmt: skip


def test_what_transformers_saves_of_it_is_the_same_again(tmp_path: Path) -> None:
    """Names and values, by its own writer: nothing of ours is read under another name by chance."""
    transformers = pytest.importorskip("transformers")
    for number, family in enumerate(
        ("DINOv2", "DINOv2, registers", "DINOv2 giant (SwiGLU)", "DINOv3 plus (SwiGLU, biases)")
    ):
        target, again = tmp_path / str(number), tmp_path / f"{number} again"
        convert(open_model(source(tmp_path / f"in {number}", family)), target, "hf")
        transformers.AutoModel.from_pretrained(target).save_pretrained(again)
        ours, theirs = load_file(target / "model.safetensors"), load_file(again / "model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_wrong_mapping_is_noticed(tmp_path: Path) -> None:
    """Queries in the place of keys, in the second block."""
    pytest.importorskip("transformers")
    model, target = open_model(source(tmp_path / "in")), tmp_path / "target"
    convert(model, target, "hf")
    tensors = load_file(target / "model.safetensors")
    query, value = (f"encoder.layer.1.attention.attention.{name}.weight" for name in ("query", "value"))
    tensors[query], tensors[value] = tensors[value], tensors[query]
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"64 x 64: pooled \S+, patch tokens \S+ DIFFERS"):
        compare(model, target, "hf", exact=False, dtype=torch.float32)


@pytest.mark.parametrize(
    ("expected", "found", "difference"),
    [
        ([1e6, -2e6], [1e6, -2e6 + 1], 5e-7),  # as large ones round
        ([1e-6, 2e-6], [2e-6, 1e-6], 0.5),  # small ones are no agreement
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([1.0, 2.0], [1.0, 2.0, 3.0], torch.nan),
        ([1.0, 2.0], [1.0, torch.nan], torch.nan),
        ([1.0, torch.nan], [1.0, torch.nan], torch.nan),
    ],
)
def test_features_are_compared_with_their_size(expected: list[float], found: list[float], difference: float) -> None:
    assert verify._difference(torch.tensor(expected), torch.tensor(found)) == pytest.approx(difference, nan_ok=True)


# -- preprocessing


def test_a_published_tag_answers_for_nothing(tmp_path: Path) -> None:
    """timm's own configuration of these names says 518 pixels, and CLIP's mean or 0.5."""
    for family in ("DINOv2", "gigantic, no layer scale"):
        target = tmp_path / family.split()[0] / "target"
        convert(open_model(source(tmp_path / family, family)), target)
        model = timm.create_model(f"local-dir:{target}", pretrained=True)
        data = timm.data.resolve_model_data_config(model)
        assert {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()} == {
            "input_size": (3, 70, 70), "interpolation": "bilinear", "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3),
            "crop_pct": 1.0, "crop_mode": "center",
        }  # fmt: skip
        about = json.loads((target / "config.json").read_text())
        assert "num_classes" not in about["model_args"]  # transformers 5 would be given it twice
        assert "hf_hub_id" not in about["pretrained_cfg"]
        assert "license" not in about["pretrained_cfg"]


@pytest.mark.parametrize("kind", ["timm", "hf"])
def test_transformers_prepares_images_as_the_training_did(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    import numpy as np
    from PIL import Image

    target = tmp_path / "target"
    convert(open_model(source(tmp_path / "in")), target, kind)
    processor = transformers.AutoImageProcessor.from_pretrained(target)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    found = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    expected = (torch.from_numpy(pixels / 255) - torch.tensor([0.4, 0.5, 0.6])) / torch.tensor([0.2, 0.25, 0.3])
    torch.testing.assert_close(found[0], expected.permute(2, 0, 1).float(), rtol=1e-5, atol=1e-5)
    wide = processor(Image.fromarray(np.zeros((100, 300, 3), np.uint8)), return_tensors="pt")["pixel_values"]
    assert wide.shape == (1, 3, 64, 64)


def test_four_channels_travel(tmp_path: Path) -> None:
    torch.manual_seed(0)
    arguments = {**FAMILIES[CLASS_TOKEN].arguments, "in_chans": 4}
    model = timm.create_model("vit_tiny_patch16_224", **arguments)
    about = {
        "timm": json.dumps({"model_name": "vit_tiny_patch16_224", **arguments}), "image_size": "64", "channels": "4",
        "mean": "[0.1, 0.2, 0.3, 0.4]", "std": "[1, 2, 3, 4]", "ranges": "[[[0, 4095]]]",
    }  # fmt: skip
    save_file(model.state_dict(), tmp_path / "in.safetensors", about)
    first = open_model(tmp_path / "in.safetensors")
    convert(first, tmp_path / "folder")
    compare(first, tmp_path / "folder", "timm", exact=True, dtype=torch.float32)
    again = open_model(tmp_path / "folder")
    assert again.inputs == first.inputs
    assert again.inputs.mean == (0.1, 0.2, 0.3, 0.4)
    assert "range of each source of the training was [[[0, 4095]]]" in (tmp_path / "folder/README.md").read_text()
    convert(again, tmp_path / "out.safetensors", "safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert {key: json.loads(file.metadata()[key]) for key in ("mean", "ranges", "channels")} == {
            "mean": [0.1, 0.2, 0.3, 0.4], "ranges": [[[0, 4095]]], "channels": 4,
        }  # fmt: skip


# -- files


def test_round_trips_return_the_same_bits(tmp_path: Path) -> None:
    first = source(tmp_path / "in", "DINOv2, registers")
    convert(open_model(first), tmp_path / "folder")
    convert(open_model(tmp_path / "folder"), tmp_path / "b.safetensors", "safetensors")
    convert(open_model(tmp_path / "b.safetensors"), tmp_path / "again")
    tensors = [
        load_file(p) for p in (first, tmp_path / "folder/model.safetensors", tmp_path / "again/model.safetensors")
    ]
    for other in tensors[1:]:
        assert other.keys() == tensors[0].keys()
        assert all(torch.equal(other[name], tensors[0][name]) for name in other)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("folder", "again")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_precision(tmp_path: Path, dtype: Any, kind: torch.dtype) -> None:
    path = source(tmp_path / "in")
    model = open_model(path)
    convert(model, tmp_path / "out.safetensors", "safetensors", dtype=dtype)
    tensors, before = load_file(tmp_path / "out.safetensors"), load_file(path)
    assert all(torch.equal(tensors[name], before[name].to(kind)) for name in before)
    found = compare(model, tmp_path / "out.safetensors", "safetensors", exact=True, dtype=kind)
    assert 1e-7 < max(row.pooled for row in found) < 0.05
    assert convert(model, tmp_path / "folder", dtype=dtype).bytes < 0.52 * path.stat().st_size + 20_000


def test_what_half_precision_cannot_hold_is_refused(tmp_path: Path) -> None:
    path = source(tmp_path / "in")
    tensors = load_file(path)
    tensors["norm.bias"] += 1e6
    with safe_open(path, "pt") as file:
        save_file(tensors, path, file.metadata())
    with pytest.raises(UserError, match=r"96 of 96 values of norm\.bias are not finite"):
        convert(open_model(path), tmp_path / "out", dtype="fp16")
    convert(open_model(path), tmp_path / "out", dtype="bf16")


@pytest.mark.parametrize("kind", ["safetensors", "hf"])
def test_several_files_with_an_index(tmp_path: Path, kind: str) -> None:
    model, target = open_model(source(tmp_path / "in")), tmp_path / "target"
    done = convert(model, target, kind, max_shard_bytes=200_000)
    shards = sorted(target.glob("*.safetensors"))
    assert [path.name for path in shards] == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    assert len(shards) > 3
    index = json.loads((target / "model.safetensors.index.json").read_text())
    found = {name: path.name for path in shards for name in load_file(path)}
    assert index["weight_map"] == found
    assert len(found) == done.tensors
    sizes = [sum(t.nbytes for t in load_file(path).values()) for path in shards]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert all(size <= 200_000 or len(load_file(path)) == 1 for size, path in zip(sizes, shards, strict=True))
    if kind == "hf":
        pytest.importorskip("transformers")
    compare(model, target, kind, exact=done.exact, dtype=torch.float32)
    if kind == "safetensors":
        again = open_model(target)
        assert all(torch.equal(again.tensors[name].read(), lazy.read()) for name, lazy in model.tensors.items())


def test_nothing_is_overwritten_unless_asked_and_only_by_what_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, target = open_model(source(tmp_path / "in")), tmp_path / "target"
    target.mkdir()
    (target / "README.md").write_text("before")
    for kind in ("timm", "hf", "safetensors", "onnx"):
        with pytest.raises(UserError, match=r"target is there already: name another target, or give --overwrite"):
            convert(model, target, kind)
    with monkeypatch.context() as patch:
        patch.setattr("lejepa_scale.conversion.targets.card", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(model, target, overwrite=True)
    assert [path.name for path in target.iterdir()] == ["README.md"]
    convert(model, target, overwrite=True)
    assert sorted(path.name for path in target.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "target"]
    (target / "mine").write_text("dear")
    with pytest.raises(UserError, match=r"target holds mine, which no conversion writes: it is not replaced"):
        convert(model, target, overwrite=True)
    assert (target / "mine").read_text() == "dear"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write \S*/file/x\S*: Not a directory"):
        convert(model, tmp_path / "file/x")


# -- runs


def test_a_run_from_the_command_line(tmp_path: Path, scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    config = small_config(
        run, scenes, train={"steps": 2, "global_batch": 16}, run={"dir": str(run), "license": "cc-by-4.0"}
    )
    loop.train(validate(config))
    rows = [("knn", "k=10", 0.4), ("knn", "k=20", 0.5), ("logistic", "", 0.75)]
    scores = [
        {"subject": "trained", "features": "pooled", "protocol": p, "variant": v, "metrics": {"top1": x}}
        for p, v, x in rows
    ]
    (run / "evaluation.json").write_text(json.dumps({"results": scores}))
    images = ["--images", str(scenes)]
    assert main(["convert", str(run), str(tmp_path / "out"), "--verify", *images]) == 0
    said = capsys.readouterr().out
    assert "verified with timm, random images of 32 x 32: pooled 0.0e+00, patch tokens 0.0e+00" in said
    assert "verified with timm, real images of 32 x 32" in said
    text = (tmp_path / "out/README.md").read_text()
    assert "license: cc-by-4.0" in text
    assert "| trained | 50.0% | 75.0% |" in text
    assert "- 2 steps of 16 images (32 in all)" in text
    assert main(["convert", str(run), str(tmp_path / "e.safetensors"), "--to", "safetensors", "--heads"]) == 0
    tensors = load_file(tmp_path / "e.safetensors")
    projector = {name: t for name, t in tensors.items() if name.startswith("projector.")}
    checkpoint = load_file(run / "checkpoints/step_00000002/model.safetensors")
    assert projector
    assert all(torch.equal(tensor, checkpoint[name]) for name, tensor in projector.items())
    assert main(["convert", str(tmp_path / "e.safetensors"), str(tmp_path / "f"), "--verify"]) == 0  # without them
    assert (
        main(["convert", str(tmp_path / "e.safetensors"), str(tmp_path / "g"), "--to", "safetensors", "--heads"]) == 2
    )
    assert "has no projector" in capsys.readouterr().err


def test_a_run_is_never_replaced(tmp_path: Path, scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    loop.train(validate(small_config(run, scenes, train={"steps": 1, "global_batch": 16})))
    before = sorted(path.name for path in run.iterdir())
    for kind in ("timm", "safetensors", "dcp", "lejepa"):
        assert main(["convert", str(run), str(run), "--to", kind, "--overwrite"]) == 2
        assert "which no conversion writes: it is not replaced" in capsys.readouterr().err
    assert sorted(path.name for path in run.iterdir()) == before


def test_weights_that_do_not_say_what_they_are_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = timm.create_model("resnet10t", num_classes=0)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pth")
    assert main(["convert", str(tmp_path / "w.pth"), str(tmp_path / "out")]) == 2
    assert "w.pth does not say which encoder it is for: name it with --encoder NAME." in capsys.readouterr().err
    words = [
        "convert",
        str(tmp_path / "w.pth"),
        str(tmp_path / "out"),
        "--encoder",
        "resnet10t",
        "--image-size",
        "96",
        "--verify",
    ]
    assert main(words) == 0
    loaded: Any = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        assert torch.equal(outputs(loaded, images)[0], outputs(model.eval(), images)[0])
    given = open_model(tmp_path / "w.pth", given=Given("resnet10t", image_size=96))
    assert given.inputs.image_size == 96


_PEAK = """
import resource, sys
from lejepa_scale.conversion import convert, open_model
import torch, timm, pathlib
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(open_model(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["timm", "hf", "safetensors"])
def test_memory_is_that_of_a_tensor_not_of_the_model(tmp_path: Path, kind: str) -> None:
    arguments = {
        "depth": 24,
        "num_classes": 0,
        "img_size": 64,
        "dynamic_img_size": True,
        "embed_dim": 512,
        "num_heads": 8,
    }
    model = timm.create_model("vit_tiny_patch16_224", **arguments)
    about = {
        "timm": json.dumps({"model_name": "vit_tiny_patch16_224", **arguments}),
        "image_size": "64", "channels": "3", "mean": "[0, 0, 0]", "std": "[1, 1, 1]",
    }  # fmt: skip
    save_file(model.state_dict(), tmp_path / "in.safetensors", about)
    assert (tmp_path / "in.safetensors").stat().st_size > 300e6
    words = [sys.executable, "-c", _PEAK, tmp_path / "in.safetensors", tmp_path / "out", kind]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 100  # MiB; its largest tensor has 4
