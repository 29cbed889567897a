"""Folders of transformers' own classes, made by transformers with random weights, as sources."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lejepa_scale.cli.main import main
from lejepa_scale.conversion import compare, convert, open_model
from lejepa_scale.conversion.native_folder import CLASSES, DEFAULTS
from lejepa_scale.errors import UserError

transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 64, "patch_size": 16}
# class; its configuration; the name of timm's; whether timm's is equal at every size; what is left out
CASES: dict[str, tuple[str, dict[str, Any], str, bool, set[str]]] = {
    "DINOv2": ("Dinov2Model", {}, "vit_small_patch14_dinov2", False, {"embeddings.mask_token"}),
    "DINOv2, another MLP, no biases, 4 channels": (
        "Dinov2Model",
        {"mlp_ratio": 3, "qkv_bias": False, "num_channels": 4},
        "vit_small_patch14_dinov2",
        False,
        {"embeddings.mask_token"},
    ),
    "DINOv2, gated": (
        "Dinov2Model",
        {"use_swiglu_ffn": True},
        "vit_giant_patch14_dinov2",
        False,
        {"embeddings.mask_token"},
    ),
    "DINOv2, registers": (
        "Dinov2WithRegistersModel",
        {"num_register_tokens": 3},
        "vit_small_patch14_reg4_dinov2",
        True,
        {"embeddings.mask_token"},
    ),
    "DINOv2 with a classifier": (
        "Dinov2ForImageClassification",
        {},
        "vit_small_patch14_dinov2",
        False,
        {"classifier.weight", "classifier.bias", "dinov2.embeddings.mask_token"},
    ),
    "ViT": (
        "ViTModel",
        {"intermediate_size": 200},
        "vit_base_patch16_224",
        False,
        {"pooler.dense.weight", "pooler.dense.bias"},
    ),
    "ViT with a classifier": (
        "ViTForImageClassification",
        {"intermediate_size": 384},
        "vit_base_patch16_224",
        False,
        {"classifier.weight", "classifier.bias"},
    ),
    "DINOv3": (
        "DINOv3ViTModel",
        {"intermediate_size": 384, "num_register_tokens": 4},
        "vit_small_patch16_dinov3_qkvb",
        True,
        {"embeddings.mask_token"},
    ),
    "DINOv3, gated, no biases": (
        "DINOv3ViTModel",
        {
            "intermediate_size": 200, "use_gated_mlp": True, "hidden_act": "silu", "query_bias": False, "value_bias": False,
            "rope_theta": 50.0,
        },
        "vit_small_plus_patch16_dinov3",
        True,
        {"embeddings.mask_token"},
    ),
}  # fmt: skip


def folder_of(path: Path, case: str = "DINOv2") -> Path:
    """As transformers saves it; no part of the weights is near zero."""
    name, settings, *_ = CASES[case]
    torch.manual_seed(0)
    model = getattr(transformers, name)
    config = model.config_class(**{**SMALL, **settings})
    model = model(config)
    for key, parameter in model.named_parameters():
        if parameter.ndim == 1 or "position" in key or "token" in key:
            parameter.data.normal_(0.3, 0.3)
    model.save_pretrained(path)
    channels = config.num_channels
    processor = transformers.BitImageProcessor(image_mean=[0.1, 0.2, 0.3, 0.4][:channels], image_std=[0.5] * channels)
    processor.save_pretrained(path)
    return path


@pytest.mark.parametrize("case", CASES)
def test_features_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    _, _, timms, exact, left_out = CASES[case]
    model = open_model(folder_of(tmp_path / "in", case))
    assert (model.architecture, model.exact, set(model.left_out)) == (timms, exact, left_out)
    assert model.inputs.mean == (0.1, 0.2, 0.3, 0.4)[: model.inputs.channels]
    assert (model.inputs.std[0], model.inputs.image_size) == (0.5, 64)
    for kind in ("timm", "hf"):
        done = convert(model, tmp_path / kind, kind)
        assert done.exact == (exact or kind == "hf")
        found = compare(model, tmp_path / kind, kind, exact=done.exact, dtype=torch.float32)
        assert {row.size for row in found} == {(64, 64), (48, 48), (96, 96), (64, 48)}
        for row in found:
            if done.exact or row.size == (64, 64):
                assert max(row.pooled, row.patches or 0.0) < 3e-6  # ViTModel's epsilon is 1e-12, timm's 1e-6


def test_there_and_back_is_the_same(tmp_path: Path) -> None:
    """But for the mask token, which no features need, and the registers' class, whose position is added to the token."""
    for case in ("DINOv2, gated", "ViT", "DINOv3, gated, no biases"):
        first = folder_of(tmp_path / case, case)
        convert(open_model(first), tmp_path / f"{case} timm")
        convert(open_model(tmp_path / f"{case} timm"), tmp_path / f"{case} hf", "hf")
        ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / f"{case} hf", first))
        theirs = {name: t for name, t in theirs.items() if not name.startswith("pooler")}
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours if "mask_token" not in name)


def test_a_pickled_folder_and_its_file_are_read_too(tmp_path: Path) -> None:
    first = folder_of(tmp_path / "in")
    whole = open_model(first / "model.safetensors")
    torch.save(load_file(first / "model.safetensors"), first / "pytorch_model.bin")
    (first / "model.safetensors").unlink()
    for named in (first, first / "pytorch_model.bin"):
        pickled = open_model(named)
        assert all(torch.equal(pickled.tensors[name].read(), lazy.read()) for name, lazy in whole.tensors.items())


@pytest.mark.parametrize("kind", DEFAULTS)
def test_what_a_configuration_leaves_unsaid_is_what_transformers_has(kind: str) -> None:
    config = transformers.AutoConfig.for_model(kind)
    assert type(config).__name__ == CLASSES[kind].replace("Model", "Config")
    found = config.to_dict()
    found.setdefault("rope_theta", (found.get("rope_parameters") or {}).get("rope_theta"))
    assert {key: found[key] for key in DEFAULTS[kind]} == DEFAULTS[kind]


def _config(**changes: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return changed


def _processor(**changes: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        path = folder / "preprocessor_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another activation": (_config(hidden_act="relu"), "hidden_act='relu' is of no model of timm's"),
    "another epsilon": (_config(layer_norm_eps=1e-3), "layer_norm_eps=0.001 is of no model"),
    "an epsilon of text": (_config(layer_norm_eps="small"), "layer_norm_eps='small' is of no model"),
    "an epsilon below zero": (_config(layer_norm_eps=-1.0), "layer_norm_eps=-1.0 is of no model"),
    "a mean of fewer channels": (
        _processor(image_mean=[0.5]),
        r"takes 3 channels, and standardizes them by mean \[0\.5\]",
    ),
    "a deviation of zero": (_processor(image_std=[0.5, 0.5, 0.0]), "deviations above 0"),
    "a mean that is no number": (_processor(image_mean=[0.5, 0.5, float("nan")]), "one number for each channel"),
    "another depth": (_config(num_hidden_layers=3), r"14 missing|18 missing|missing \(encoder\.layer\.2"),
    "heads that do not divide": (_config(num_attention_heads=5), "timm refuses its arguments"),
    "a width of text": (_config(hidden_size="wide"), "does not describe a Dinov2Model"),
    "a width without end": (_config(hidden_size=10**9), "which a file may not"),
    "no heads": (_config(num_attention_heads=0), "config.json"),
    "another library's class": (_config(model_type="siglip_vision_model"), "nor one of transformers' Dinov2Model"),
    "no preprocessing": (lambda f: (f / "preprocessor_config.json").unlink(), "which says mean and standard deviation"),
    "preprocessing cut short": (
        lambda f: (f / "preprocessor_config.json").write_text("{"),
        r"preprocessor_config\.json cannot be read",
    ),
    "values as they are": (_processor(do_rescale=False), "does not scale images by 1/255"),
    "a tensor missing": (_tensors(lambda t: t.pop("layernorm.bias")), r"1 missing \(layernorm\.bias\)"),
    "a tensor too many": (_tensors(lambda t: t.update(more=torch.ones(2))), r"1 left over \(more\)"),
    "a tensor of another shape": (
        _tensors(lambda t: t.update({"layernorm.bias": torch.ones(5)})),
        r"1 of another shape \(layernorm\.bias\)",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_no_model_of_timms_is_is_refused(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, says = DAMAGED[case]
    folder = folder_of(tmp_path / "in")
    damage(folder)
    with pytest.raises(UserError, match=says):
        open_model(folder)
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path / "in", "ViT")
    assert main(["convert", str(folder), str(tmp_path / "out"), "--verify"]) == 0
    text = capsys.readouterr().out
    assert "left out, as no part of the features: pooler.dense.bias, pooler.dense.weight" in text
    assert "exact at 64 px alone: timm interpolates positions otherwise." in text
    assert "equal to their source at 64 px alone" in (tmp_path / "out/README.md").read_text()
