from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, small_config

from lejepa_scale.config import Config, check_world, dump, load_config, plan_batches, recorded, validate
from lejepa_scale.errors import UserError
from lejepa_scale.training.schedule import learning_rate

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_recipe_is_sound(path: Path) -> None:
    """Parsed, built on the meta device, every view size passed through the encoder, batch divided over its hardware."""
    from lejepa_scale.model import check

    config = load_config(path)
    expected = {"vitg_lvd": 1.13e9, "vitgigantic_lvd": 1.84e9, "vith_in1k": 0.63e9, "vitl_in1k": 0.30e9}
    parameters = sum(p.numel() for p in check(config).parameters())
    if path.stem in expected:
        assert parameters == pytest.approx(expected[path.stem], rel=0.04)
    header = path.read_text().split("\nrun:")[0]
    stated = re.search(r"Hardware: (\d+)", header)  # cores or GPUs: one rank each
    ranks = int(stated[1]) if stated else 1
    plan = check_world(config, ranks)
    assert plan.micro_batch * ranks * plan.accumulation == config.train.global_batch
    for word in ("Command:", "Hardware:", "Hours:", "Score:"):
        assert word in header, f"the header of {path.name} does not state {word}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.lambda_=0.1", "unknown key objective.lambda_, did you mean objective.lambda"),
        ("objective.lamda=0.1", "unknown key objective.lamda, did you mean objective.lambda"),
        ("train.lr=0.1", "did you mean optim.lr"),
        ("trian.steps=3", "did you mean train"),
        ("train.steps=-3", "train.steps.*greater than 0"),
        ("engine.name=fsdp2", "engine.name.*'fsdp'"),
        ("data.views.local.scale=[0.5,0.1]", "data.views.local.*0 < low <= high"),
        ("data.views.global.count=0", "global.count must be at least 1"),
        ("engine.shard_degree=2", "engine.shard_degree = 2 has no effect with engine.name = single"),
        ("data.shards.0.weight=2", r"Give all of data.shards at once, as in data.shards=\[{shards"),
        ("train", "must read key.sub=value"),
        ("train.steps.x=1", "steps is a value"),
        ("data.shards=[]", "data.shards"),
        ("run.dir=2026-13-45", "'2026-13-45' is not a YAML value"),  # a date that there is not
    ],
)
def test_wrong_values_are_refused_by_name(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(small_config("r", "s")))
    with pytest.raises(UserError, match=message):
        load_config(path, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"run: [", "c.yaml cannot be read, it is not valid YAML: .*line 1"),
        (b"\xff\xfe\x80 {", "c.yaml cannot be read, it is not valid YAML"),  # no UTF-8
        (b"run: \x00", "c.yaml cannot be read, it is not valid YAML"),  # zeros, of a crash
        (b"run: {dir: 2026-13-45}", "c.yaml cannot be read, it is not valid YAML: month must be"),
        (b"[" * 100_000, "c.yaml cannot be read, it is not valid YAML"),
        (b"[1]", "c.yaml must hold a mapping"),
        (b"run: 5", "c.yaml: .*run: "),
        (b"", "c.yaml: .*run is required"),
    ],
)
@pytest.mark.parametrize("read", [load_config, lambda path: recorded(path.read_bytes(), str(path))])
def test_what_is_no_configuration_is_named(
    tmp_path: Path, text: bytes, message: str, read: Callable[[Path], Config]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(text)
    with pytest.raises(UserError, match=f"(?s){message}"):
        read(path)


def test_overrides_and_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(small_config("r", "s")))
    config = load_config(path, ["optim.lr=5e-4", "objective.lambda=0.1", "data.shards=[a.tar,b.tar]"])
    assert (config.optim.lr, config.objective.lambda_, config.data.shards[0].shards) == (5e-4, 0.1, ["a.tar", "b.tar"])
    assert validate(yaml.safe_load(dump(config))) == config


def test_batch_arithmetic_is_shown() -> None:
    def config(**train: int) -> Config:
        return validate(small_config("r", "s", train=train))

    assert plan_batches(config(global_batch=48, micro_batch=4), 3).accumulation == 4
    assert plan_batches(config(global_batch=48), 3).micro_batch == 16
    with pytest.raises(UserError, match=r"50.*8 x 3 = 24.*50 / 24 = 2.08"):
        plan_batches(config(global_batch=50, micro_batch=8), 3)
    with pytest.raises(UserError, match=r"16 cannot be split over 3 ranks.*for instance 18"):
        plan_batches(config(global_batch=16), 3)
    with pytest.raises(UserError, match="single runs one process, but 2"):
        check_world(config(), 2)


def test_statistics_of_one_sample_are_refused_before_anything_starts() -> None:
    others = {"regularizer": "weak_sigreg"}, {"regularizer": "visreg"}, {"visreg": {"weight": 0.1}}
    for objective in ({"sigreg": {"estimator": "u"}}, *others):
        tree = small_config("r", "s", train={"global_batch": 2, "micro_batch": 1}, objective=objective)
        with pytest.raises(UserError, match="see 1 image at a time"):
            check_world(validate(tree), 1)
        exact = validate({**tree, "objective": {**objective, "accumulation": "exact"}})
        assert check_world(exact, 1).accumulation == 2


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"activation_checkpointing": "budget"}, "set engine.compile=true too"),
        ({"name": "ddp", "cpu_offload": True}, "cpu_offload = true has no effect with engine.name = ddp"),
        ({"fp8": True}, "fp8 needs engine.precision=bf16"),
        ({"activation_checkpointing": True}, "'none', 'full', 'selective' or 'budget'"),
    ],
)
def test_settings_of_the_step_that_do_not_go_together_are_refused(engine: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(small_config("r", "s", engine=engine))


def test_configuration_imports_no_torch() -> None:
    code = "import sys, lejepa_scale.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_learning_rate_warms_up_and_decays() -> None:
    optim = validate(small_config("r", "s", optim={"lr": 1.0, "warmup_steps": 4})).optim
    rates = [learning_rate(step, 20, optim) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(1e-3)
    assert all(a >= b for a, b in pairwise(rates[4:]))
