"""Checkpoints that were written before keys of the configuration moved stay of use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import small_config
from saving import Holder

from lejepa_scale.checkpoint import Progress, Saver, Store, load_encoder
from lejepa_scale.config import dump, validate
from lejepa_scale.model import build
from lejepa_scale.training import resume


def flat(text: str) -> str:
    """A dumped configuration as it was before the objective had sections of its own."""
    tree: dict[str, Any] = yaml.safe_load(text)
    objective = tree["objective"]
    del objective["sigreg"]["tf32"]  # a key of later
    objective |= {**objective.pop("sigreg"), **objective.pop("weak_sigreg")}
    objective["scale_centre"] = objective.pop("visreg")["weight"]
    return yaml.safe_dump(tree)


def test_an_encoder_of_a_checkpoint_from_before_keys_moved(tmp_path: Path) -> None:
    config = validate(small_config(tmp_path, "s.tar", objective={"sigreg": {"knots": 9}, "visreg": {"weight": 0.1}}))
    # prefetch had no effect on one process, and was let pass then
    text = flat(dump(config)).replace("prefetch: 1\n", "prefetch: 3\n")
    module = build(config)
    weights = {name: t.detach() for name, t in module.state_dict().items()}
    saver = Saver(Store(tmp_path, keep=1), Holder({"value": weights}, updates=0))
    saver.begin(Progress(1, "shards"), {}, text)
    saver.finish()
    encoder, found = load_encoder(tmp_path)
    assert found == config
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, weights[f"encoder.{name}"]), name


def test_resuming_names_what_changed_and_not_what_moved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    before, after = (validate(small_config(tmp_path, "s.tar", train={"steps": n, "global_batch": 16})) for n in (4, 5))
    (tmp_path / "config.yaml").write_text(flat(dump(before)))
    resume.write_config(after)
    said = capsys.readouterr().out + caplog.text
    assert "train.steps: 4 -> 5" in said
    assert "objective" not in said
    assert validate(yaml.safe_load((tmp_path / "config.yaml").read_text())) == after


def test_a_key_that_is_new_is_no_change_unless_it_is_set(tmp_path: Path) -> None:
    tree = small_config(tmp_path, "s.tar")
    old = yaml.safe_load(dump(validate(tree)))
    del old["objective"]["sigreg"]["tf32"], old["engine"]["fp8_recipe"]
    path, before = tmp_path / "config.yaml", yaml.safe_dump(old).encode()
    for sections, expected in (({}, "with the keys that are new"), ({"tf32": True}, "sigreg.tf32: False -> True")):
        now = dump(validate(small_config(tmp_path, "s.tar", objective={"sigreg": sections})))
        said = resume._changes(path, before, now)
        assert expected in said
        assert "fp8_recipe" not in said
