"""A step that came to no numbers, found again: from a run with one image that a module cannot take, on one and two ranks."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import mostly_slow, small_config
from PIL import Image
from ranks import run_ranks
from timm.layers import PatchEmbed
from torch import Tensor, nn

from lejepa_scale.cli.main import main
from lejepa_scale.config import Config, validate
from lejepa_scale.errors import UserError
from lejepa_scale.operations.rollback import roll_back
from lejepa_scale.parallel import process_group
from lejepa_scale.training import loop
from lejepa_scale.training.hunt import Hunt
from lejepa_scale.training.replay import Replayed, replay

BRIGHTEST = 2.3  # mean of a normalized view, which a white one alone is above
PLAIN = {"jitter": 0, "grayscale": 0, "blur": 0, "solarize": 0}
PATCHES = PatchEmbed.forward
pytestmark = pytest.mark.unchecked


def no_logarithm(self: PatchEmbed, x: Tensor) -> Tensor:
    """Of a negative number, for white images."""
    out = PATCHES(self, x)
    return out + 0 * torch.log(BRIGHTEST - x.mean((1, 2, 3))).view(-1, *[1] * (out.ndim - 1))


def no_slope(self: PatchEmbed, x: Tensor) -> Tensor:
    """Of a root at zero: forward it is well."""
    out = PATCHES(self, x)
    room = (BRIGHTEST - x.mean((1, 2, 3))).clamp(min=0).view(-1, *[1] * (out.ndim - 1))
    return out + 0 * (room * out.square()).sqrt()


@pytest.fixture
def shards(scenes: Path, tmp_path: Path) -> tuple[Path, str]:
    """The scenes, of which one is white, and its name."""
    folder, name = tmp_path / "shards", ""
    folder.mkdir()
    white = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), 255, np.uint8)).save(white, "PNG")
    for number, path in enumerate(sorted(scenes.glob("*.tar"))):
        with tarfile.open(path) as old, tarfile.open(folder / path.name, "w") as new:
            images = [member.name for member in old if member.name.endswith("png")]
            for member in old:
                file = old.extractfile(member)
                assert file is not None
                data = file.read()
                if number == 1 and member.name == images[5]:
                    data, name = white.getvalue(), f"{path.name}/{member.name.partition('.')[0]}"
                member.size = len(data)
                new.addfile(member, io.BytesIO(data))
    return folder, name


def config_of(run: Path, shards: Path, **sections: Any) -> Config:
    data = {"augment": PLAIN, **sections.pop("data", {})}
    train = {"steps": 6, "global_batch": 16, **sections.pop("train", {})}
    return validate(small_config(run, shards, data=data, train=train, checkpoint={"every": 2, "keep": 5}, **sections))


@pytest.mark.parametrize("engine", mostly_slow(["ddp", "fsdp", "zero3"], "fsdp"))
def test_two_ranks_find_the_sample_and_the_module(engine: str, shards: tuple[Path, str], tmp_path: Path) -> None:
    folder, name = shards
    run = tmp_path / "run"
    run_ranks(_trained, 2, str(run), str(folder), engine)
    found = run_ranks(_replayed, 2, str(run))
    assert found[0].of_ranks == found[1].of_ranks
    assert not found[0].finite
    assert found[0].same_ranks
    (rank,) = [rank for rank, (_, samples) in enumerate(found[0].of_ranks) if samples]
    assert found[0].of_ranks[rank][1] == [name]
    first = found[0].of_ranks[rank][0]
    assert first is not None
    assert first.module == "encoder.backbone.patch_embed", first
    assert first.operation == "aten.log.default"
    assert first.phase == "forward"
    assert first.alone


def _trained(folder: str, shards: str, engine: str) -> None:
    process_group.leave()  # `train` and `replay` join the ranks themselves
    PatchEmbed.forward = no_logarithm  # type: ignore[method-assign]
    loop.train(config_of(Path(folder), Path(shards), engine={"name": engine}))


def _replayed(folder: str) -> Replayed:
    process_group.leave()
    PatchEmbed.forward = no_logarithm  # type: ignore[method-assign]
    (file,) = (Path(folder) / "nonfinite").iterdir()
    return replay(file)


def test_a_gradient_is_found_too(shards: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatchEmbed, "forward", no_slope)
    loop.train(config_of(tmp_path / "run", shards[0]))
    (file,) = (tmp_path / "run/nonfinite").iterdir()
    ((first, samples),) = replay(file).of_ranks
    assert samples == []  # their features are finite
    assert first is not None
    assert (first.phase, first.module) == ("backward", "encoder.backbone.patch_embed")
    assert first.alone


def test_the_advice_works(
    shards: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sample is named, left out, and the run goes back and comes to its end without a skipped step."""
    monkeypatch.setattr(PatchEmbed, "forward", no_logarithm)
    run, (folder, name) = tmp_path / "run", shards
    loop.train(config_of(run, folder))
    (file,) = (run / "nonfinite").iterdir()
    step = int(json.loads(file.read_text())["step"])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["replay", str(file)]) == 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    said = capsys.readouterr().out
    assert f"step {step}, from " in said
    assert "not finite, as in the run" in said
    assert f"train.skip_samples=[{name}]" in said
    assert f"lejepa rollback {run}" in said
    assert main(["rollback", str(run), "--to", "0"]) == 2  # there is none so early
    assert main(["rollback", str(run), "--to", "2"]) == 0
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000002"]
    assert len([*run.glob("rolled_back_*/step_*")]) == 2
    loop.train(config_of(run, folder, train={"skip_samples": [name]}))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    if step > 2:
        assert records[-1]["nonfinite_steps"] == 0
        left_out = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
        assert [(one["step"], one["reason"]) for one in left_out] == [(step, "train.skip_samples leaves it out")]


def test_what_is_well_is_said_to_be_well(shards: tuple[Path, str], tmp_path: Path, monkeypatch: Any) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(PatchEmbed, "forward", no_logarithm)
        loop.train(config_of(run, shards[0]))
    (file,) = (run / "nonfinite").iterdir()
    found = replay(file)
    assert found.finite
    assert found.of_ranks == [(None, [])]


def test_mistakes(shards: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, (folder, name) = tmp_path / "run", shards
    with pytest.raises(UserError, match=r"no shard of data.shards has a sample 'shard-000000.tar/x' \(nor 1 more"):
        loop.train(config_of(run, folder, train={"skip_samples": ["shard-000000.tar/x", "y", name]}))
    with pytest.raises(UserError, match="No such file"):
        replay(run / "nonfinite/step_00000001.json")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match="is no record of a step"):
        replay(tmp_path / "x.json")
    with pytest.raises(UserError, match="is no run: it has no config"):
        roll_back(tmp_path)


def test_a_checkpoint_before_the_step_is_needed(
    shards: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PatchEmbed, "forward", no_logarithm)
    run = tmp_path / "run"
    loop.train(config_of(run, shards[0]))
    (file,) = (run / "nonfinite").iterdir()
    file.write_text(file.read_text().replace(f'"step": {int(file.stem[5:])}', '"step": 1'))
    with pytest.raises(UserError, match=r"no checkpoint of .* is from before step 1; the oldest"):
        replay(file)


def test_masks_are_no_finding() -> None:
    """Attention with a mask holds minus infinity on purpose."""
    hunt, layer = Hunt(), nn.Linear(4, 4)
    with hunt.watching(layer), hunt.phase("forward"):
        scores = layer(torch.randn(4, 4)).masked_fill(torch.ones(4, 4).triu(1).bool(), float("-inf"))
        scores.softmax(-1).sum().backward()
    assert hunt.found is None


class _Between(nn.Module):
    """A root at zero between two layers, in nobody's forward pass but this one's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second((0 * self.first(x)).sqrt())


def test_what_lies_between_modules_is_their_parents() -> None:
    """The slope of a root at zero is infinite; the layer behind it is not to blame."""
    hunt, outer = Hunt(), nn.Sequential(_Between())
    with hunt.watching(outer), hunt.phase("backward"):
        outer(torch.randn(2, 4)).sum().backward()
    assert hunt.found is not None
    assert hunt.found.module == "0"
    assert hunt.found.alone
