"""A run on images of four channels and twelve bits, from shards to an export; and what other channels than three refuse."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import timm
import torch
from conftest import ROOT, Command, mostly_slow, small_config
from safetensors import safe_open
from saving import exported
from timm.models import adapt_input_conv

from lejepa_scale.checkpoint import load_encoder, pretrained
from lejepa_scale.cli.main import main
from lejepa_scale.config import BatchPlan, validate
from lejepa_scale.cost import step_flops, step_memory
from lejepa_scale.data.evaluation import labelled_batches
from lejepa_scale.data.images.pixels import RGB, of_run
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation import evaluate, extract
from lejepa_scale.evaluation.subjects import of_encoder
from lejepa_scale.model import Encoder, build_encoder, check
from lejepa_scale.training.loop import train

MEAN, STD = [0.5, 0.4, 0.3, 0.6], [0.25, 0.2, 0.3, 0.35]
NO_COLOURS = {"saturation": 0, "hue": 0, "grayscale": 0}
FOUR = {"channels": 4, "mean": MEAN, "std": STD, "augment": NO_COLOURS}
ENCODERS = {
    "vit": {},
    "resnet": {"encoder": "resnet10t", "options": {"channels": [8, 8, 16, 16], "stem_width": 8}},
}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 labelled scenes of 32 px, 4 channels and 12 bits, written by the command."""
    out = tmp_path_factory.mktemp("deep") / "shards"
    words = "shards make synthetic --count 48 --size 32 --channels 4 --bits 12 --format tif --out"
    assert main([*words.split(), str(out)]) == 0
    return out


def config_of(run: Path, shards: Path, **sections: dict[str, Any]) -> Any:
    data = {"shards": [{"shards": str(shards), "range": [0, 4095]}], **FOUR, **sections.pop("data", {})}
    return validate(small_config(run, shards, data=data, **sections))


@pytest.mark.parametrize("kind", mostly_slow(ENCODERS, "vit"))
def test_a_run_of_four_channels_and_twelve_bits(kind: str, deep: Path, tmp_path: Path) -> None:
    """The export's features, by timm and by an arithmetic of the pixels that is not ours, are the checkpoint's."""
    config = config_of(tmp_path / "run", deep, model=ENCODERS[kind])
    train(config)
    encoder, _ = load_encoder(tmp_path / "run")
    first, _ = load_encoder(tmp_path / "run", weights="first")
    convolution = next(m.weight for m in encoder.modules() if isinstance(m, torch.nn.Conv2d))
    before = next(m.weight for m in first.modules() if isinstance(m, torch.nn.Conv2d))
    assert convolution.shape[1] == 4
    assert (convolution != before).flatten(2).any(2).all(0).all()  # every channel has learned

    batches = labelled_batches(str(deep), image_size=32, batch_size=48, pixels=of_run(config.data))
    model = of_encoder(encoder, "encoder", 32, of_run(config.data)).build()
    ours = extract(model, batches, torch.device("cpu"), pixels=of_run(config.data)).rows["pooled"]
    target = tmp_path / "encoder.safetensors"
    exported(tmp_path / "run", target)
    with safe_open(target, "pt") as file:
        said = file.metadata()
        plain = timm.create_model(**json.loads(said["timm"])).eval()
        plain.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
    mean, std = (np.array(json.loads(said[key])) for key in ("mean", "std"))
    assert (said["channels"], json.loads(said["ranges"])) == ("4", [[[0, 4095]]])
    with tarfile.open(deep / "shard-000000.tar") as tar:
        stored = [tifffile.imread(io.BytesIO(tar.extractfile(m).read())) for m in tar if m.name.endswith(".tif")]
    pixels = (np.stack(stored).astype(np.float64) / 4095 - mean) / std
    with torch.inference_mode():
        expected = plain(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float())
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    found = evaluate(tmp_path / "run", str(deep), str(deep))
    torch.testing.assert_close(found.features.rows, expected, rtol=1e-4, atol=1e-4)
    assert found.results[-1].width == 4 * 32 * 32
    alone = evaluate(encoder, str(deep), str(deep), image_size=32, pixels=of_run(config.data))
    assert torch.equal(alone.features.rows, found.features.rows)
    for wrong in ({"pixels": RGB}, {}):
        with pytest.raises(
            UserError, match=r"an Encoder of 4 channel\(s\) takes .* pixels=Pixels\(4, range, mean, std\)"
        ):
            evaluate(encoder, str(deep), str(deep), image_size=32, **wrong)
    with pytest.raises(UserError, match=r"takes what its images are as pixels=Pixels"):
        evaluate(encoder, str(deep), str(deep), image_size=32, value_range=((0, 4095),))
    with pytest.raises(UserError, match="knows its pixels"):
        evaluate(tmp_path / "run", str(deep), str(deep), pixels=RGB)


def test_three_channels_become_four_as_timm_has_it(deep: Path, scenes: Path, tmp_path: Path) -> None:
    """A run continued from RGB weights, and one that another number of channels cannot go on from."""
    train(validate(small_config(tmp_path / "rgb", scenes)))
    config = config_of(
        tmp_path / "run", deep, model={"init_from": str(tmp_path / "rgb")}, train={"steps": 2, "global_batch": 16}
    )
    rgb, four = load_encoder(tmp_path / "rgb")[0], build_encoder(config)
    loaded = pretrained.load(config.model.init_from, four)
    name = "patch_embed.proj.weight"
    assert torch.equal(loaded.weights[name], adapt_input_conv(4, rgb.backbone.state_dict()[name]))
    train(config)
    five = {"channels": 5, "mean": [0.5] * 5, "std": [0.2] * 5}
    with pytest.raises(UserError, match=r"patch_embed\.proj\.weight"):
        train(config_of(tmp_path / "run", deep, data=five, train={"steps": 3, "global_batch": 16}))


def test_what_is_wrong_with_channels_is_said_by_its_key(deep: Path, tmp_path: Path) -> None:
    for data, words in (
        ({"mean": [0.5] * 3}, "data.mean has 3 value(s) for data.channels = 4: `lejepa shards statistics` prints"),
        ({"std": [0.5] * 5}, "data.std has 5 value(s) for data.channels = 4"),
        ({"std": [0.5, 0.5, 0.0, 0.5]}, "greater than 0"),
        ({"augment": {}}, "data.augment: saturation, hue, grayscale need red, green and blue, which data.channels = 4"),
        ({"augment": {"jitter": 0}}, "data.augment: grayscale need red"),
        ({"shards": [{"shards": "s", "range": [9, 9]}]}, "range must satisfy low < high, got [9, 9]"),
        ({"shards": [{"shards": "s", "range": [[0, 9]] * 3}]}, "the range of source s has 3 intervals: one is for all"),
    ):
        with pytest.raises((UserError, ValueError), match=re.escape(words)):
            config_of(tmp_path / "run", deep, data=data)
    with pytest.raises(UserError, match=r"model\.options\.in_chans is set by data\.channels"):
        check(config_of(tmp_path / "run", deep, model={"options": {"in_chans": 5}}))
    assert Encoder("vit_nano", image_size=32, channels=4, options={"in_chans": 4, "depth": 1}).channels == 4


def test_the_advice_of_the_errors_works(
    command: Command, deep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From RGB settings to a run, by doing what each error says."""
    views = "{global: {count: 2, size: 32}, local: {count: 0}}"
    words = [ROOT / "launchers/train.py", "--config", "quickstart", f"run.dir={tmp_path / 'run'}", "engine.name=single"]
    words += ["train.steps=1", "train.global_batch=8", f"data.views={views}", f"data.shards={deep}"]
    words += ["model.encoder=vit_nano", "model.options={depth: 1}", "optim.warmup_steps=0"]

    def said(more: list[str], status: int = 2) -> str:
        result = command(*words, *more)
        assert result.returncode == status, result.stderr
        return str(result.stderr)

    assert "4 bands (32 x 32 x 4), not data.channels = 3" in said([])
    assert "lejepa shards statistics" in said(["data.channels=4"])
    assert main(["shards", "statistics", str(deep), "--channels", "4"]) == 0
    proposed = re.search(r"--range 0 (\d+) \(all of 12 bits\)", capsys.readouterr().out)
    assert proposed is not None
    assert proposed[1] == "4095"
    assert main(["shards", "statistics", str(deep), "--channels", "4", "--range", "0", "4095"]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("data.")]
    assert [line.partition("=")[0] for line in printed] == ["data.shards", "data.channels", "data.mean", "data.std"]
    faults = said(printed)
    zeros = re.findall(r"data\.augment\.\w+=0", faults)
    assert len(zeros) == 3
    said([*printed, *zeros], status=0)
    assert main(["evaluate", str(tmp_path / "run"), "--train", str(deep), "--test", str(deep)]) == 0
    assert main(["picture", str(tmp_path / "run"), "--shards", str(deep), "--out", str(tmp_path / "p.png")]) == 0
    capsys.readouterr()
    again = ["evaluate", str(tmp_path / "run"), "--train", str(deep), "--test", str(deep), "--range"]
    for numbers, refusal in (
        ("5", "--range takes LOW HIGH"),
        ("5 1", "low < high, got [5, 1]"),
        ("0 inf", "low < high, got [0, inf]"),
        ("0 1 0 1", "a range of 2 intervals, [0, 1] [0, 1]: one is for all channels, or 4 for each"),
    ):
        assert main([*again, *numbers.split()]) == 2
        assert refusal in capsys.readouterr().err
    assert main(["shards", "make", "synthetic", "--count", "1", "--channels", "5", "--out", str(tmp_path / "x")]) == 2
    assert "--format jpg cannot hold 5 channels of 8 bits" in capsys.readouterr().err


def test_the_cost_counts_channels() -> None:
    """A patch embedding is one product with a kernel of C x P x P: forward, and backward for its weights."""
    plan = BatchPlan(micro_batch=4, ranks=1, accumulation=1)
    augment = {"augment": NO_COLOURS, "mean": [0.5] * 5, "std": [0.5] * 5}
    rgb, five = (validate(small_config("r", "s", data=d)) for d in ({}, {"channels": 5, **augment}))
    tokens = 4 * 2 * (4 * 4 + 2 * 2)
    assert step_flops(five, plan).patch_embedding == 2 * 2 * tokens * 5 * 8 * 8 * 128
    assert step_flops(rgb, plan).patch_embedding * 5 == step_flops(five, plan).patch_embedding * 3
    assert step_memory(rgb, plan).inputs * 5 == step_memory(five, plan).inputs * 3
    resnet = {"model": {"encoder": "resnet10t", "options": {}}}
    assert (
        step_flops(validate(small_config("r", "s", data={"channels": 5, **augment}, **resnet)), plan).whole_encoder
        > step_flops(validate(small_config("r", "s", **resnet)), plan).whole_encoder
    )
