"""Damaged and foreign sources: each is refused in a paragraph, before memory is asked for, and nothing that a file says is
run or handed on unseen."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.conversion import FAMILIES, written
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lejepa_scale.cli.main import main
from lejepa_scale.config import validate
from lejepa_scale.conversion import convert, open_model
from lejepa_scale.errors import UserError


def export(folder: Path) -> Path:
    return written(FAMILIES["ViT, class token"], folder)


def folder_of(tmp_path: Path) -> Path:
    convert(open_model(export(tmp_path)), tmp_path / "folder")
    return tmp_path / "folder"


def changed(path: Path, tensors: Callable[[dict[str, Any]], Any] = lambda _: None, **metadata: Any) -> Path:
    """The export, with other tensors or metadata; None takes a key away."""
    found = load_file(path)
    tensors(found)
    with safe_open(path, "pt") as file:
        about = {**file.metadata(), **metadata}
    save_file(found, path, {key: value for key, value in about.items() if value is not None})
    return path


def arguments(path: Path, **given: Any) -> Path:
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["timm"])
    return changed(path, timm=json.dumps({**about, **given}))


def config(folder: Path, **given: Any) -> Path:
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, **given}))
    return folder


def cfg(folder: Path, **given: Any) -> Path:
    about = json.loads((folder / "config.json").read_text())
    return config(folder, pretrained_cfg={**about["pretrained_cfg"], **given})


class _Runs:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


EXPORTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a tensor is missing": (lambda p: changed(p, lambda t: t.pop("norm.bias")), r"1 missing \(norm\.bias\)"),
    "one too many": (lambda p: changed(p, lambda t: t.update(x=torch.ones(2))), r"1 left over \(x\)"),
    "another shape": (
        lambda p: changed(p, lambda t: t.update({"norm.bias": torch.ones(2)})),
        r"1 of another shape \(norm\.bias\)",
    ),
    "many are missing": (lambda p: changed(p, lambda t: [t.pop(k) for k in list(t)[:9]]), r"9 missing \(.*, \.\.\.\)"),
    "no metadata": (lambda p: save_file(load_file(p), p), r"does not say which encoder it is for .*--encoder NAME"),
    "no size": (lambda p: changed(p, image_size=None), "'image_size'"),
    "a size that is none": (lambda p: changed(p, image_size="big"), "--encoder NAME"),
    "a mean that is none": (lambda p: changed(p, mean="[1, 'x']"), "--encoder NAME"),
    "arguments that are no JSON": (lambda p: changed(p, timm="{"), "--encoder NAME"),
    "arguments that are a list": (lambda p: changed(p, timm="[]"), "--encoder NAME"),
    "an unknown model": (
        lambda p: arguments(p, model_name="vit_nowhere"),
        r"'vit_nowhere', which timm \S+ does not know",
    ),
    "a path to unpickle": (lambda p: arguments(p, checkpoint_path="/tmp/x.pth"), "sets the argument checkpoint_path"),
    "a download": (lambda p: arguments(p, pretrained=True), "sets the argument pretrained"),
    "an overlay": (
        lambda p: arguments(p, pretrained_cfg_overlay={"url": "http://x"}),
        "sets the argument pretrained_cfg_overlay",
    ),
    "a class": (lambda p: arguments(p, norm_layer="os.system"), "sets the argument norm_layer"),
    "an unknown argument": (lambda p: arguments(p, whatever=1), "sets the argument whatever"),
    "a depth beyond memory": (lambda p: arguments(p, depth=10**9), "sets the argument depth"),
    "a width beyond memory": (lambda p: arguments(p, embed_dim=10**12), "sets the argument embed_dim"),
    "a depth that does not fit": (lambda p: arguments(p, depth=3), r"12 missing"),
    "arguments that do not go together": (lambda p: arguments(p, num_heads=7), "timm refuses its arguments"),
    "a size that does not go": (
        lambda p: arguments(p, img_size=-16),
        "timm refuses its arguments|of another shape|missing",
    ),
    "cut short": (lambda p: p.write_bytes(p.read_bytes()[:-7]), r"cannot be read: .*Copy or download it again"),
    "cut in the header": (lambda p: p.write_bytes(p.read_bytes()[:60]), "cannot be read: .*Copy or download it again"),
    "empty": (lambda p: p.write_bytes(b""), "cannot be read: .*Copy or download it again"),
    "zeros": (lambda p: p.write_bytes(bytes(4096)), "cannot be read: .*Copy or download it again"),
    "a pickle by that name": (
        lambda p: torch.save({"a": torch.ones(1)}, p),
        "cannot be read: .*Copy or download it again",
    ),
    "values that are none": (
        lambda p: changed(p, lambda t: t["norm.bias"].fill_(torch.nan)),
        r"norm\.bias are not finite",
    ),
    "one infinity": (
        lambda p: changed(p, lambda t: t["cls_token"].view(-1)[3:4].fill_(torch.inf)),
        "1 of 96 values of cls_token",
    ),
}
FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        r"holds no model\.safetensors, whole or with an index",
    ),
    "config.json cut short": (lambda f: (f / "config.json").write_text("{"), "does not describe an encoder of timm's"),
    "config.json of another library": (
        lambda f: (f / "config.json").write_text('{"model_type": "bert"}'),
        "'architecture'",
    ),
    "config.json is a list": (lambda f: (f / "config.json").write_text("[]"), "does not describe an encoder"),
    "an unknown architecture": (lambda f: config(f, architecture="x"), "which timm .* does not know"),
    "arguments that unpickle": (
        lambda f: config(f, model_args={"checkpoint_path": "x"}),
        "sets the argument checkpoint_path",
    ),
    "no input size": (lambda f: cfg(f, input_size=None), "does not describe an encoder"),
    "images that are not square": (lambda f: cfg(f, input_size=[3, 64, 32]), "64 x 32 pixels are not square"),
    "a mean of text": (lambda f: cfg(f, mean="abc"), "does not describe an encoder"),
    "a mean of fewer channels": (lambda f: cfg(f, mean=[0.5]), "takes 3 channels, and standardizes them by mean"),
    "a deviation of zero": (lambda f: cfg(f, std=[0, 1, 1]), "deviations above 0"),
    "an index that names a file elsewhere": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'),
        "which is not in the folder",
    ),
    "an index that is none": (lambda f: (f / "model.safetensors.index.json").write_text("7"), "cannot be read"),
    "an index of other tensors": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}'),
        "differ in 31 tensors",
    ),
}


def refused(source: Path, target: Path, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(source), str(target)]) == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    with pytest.raises(UserError, match=says):
        convert(open_model(str(source)), target)
    assert not target.exists()
    assert not list(target.parent.glob("*.partial"))


@pytest.mark.parametrize("case", EXPORTS)
def test_a_file_that_is_not_what_it_says(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, says = EXPORTS[case]
    path = export(tmp_path)
    damage(path)
    refused(path, tmp_path / "target", says, capsys)


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_is_not_what_it_says(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, says = FOLDERS[case]
    folder = folder_of(tmp_path)
    damage(folder)
    refused(folder, tmp_path / "target", says, capsys)


def test_a_pickle_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"state_dict": _Runs()}))
    words = ["convert", str(tmp_path / "w.pth"), str(tmp_path / "out"), "--encoder", "resnet10t"]
    assert main(words) == 2
    assert not (tmp_path / "ran").exists()
    assert "w.pth" in capsys.readouterr().err


def test_a_configuration_cannot_make_timm_open_files(tmp_path: Path) -> None:
    """The configuration of a checkpoint is a file of others too."""
    from conftest import small_config

    from lejepa_scale.model import check

    for option in ("checkpoint_path", "pretrained", "pretrained_cfg", "cache_dir"):
        tree = small_config("r", "s", model={"encoder": "vit_nano", "options": {option: str(tmp_path / "x.pth")}})
        with pytest.raises(UserError, match=rf"model\.options\.{option}: weights come from model\.init_from"):
            check(validate(tree))
