"""Plans: what fits, what to change where it does not, and what a whole run comes to."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from conftest import ROOT

from lejepa_scale.cli.main import main
from lejepa_scale.config import changed, check_world, load_config
from lejepa_scale.cost import step_memory
from lejepa_scale.cost.machines import machine
from lejepa_scale.errors import UserError
from lejepa_scale.operations import plan_report, planning

H100 = planning.Assumptions(machine("h100"))
VITG = str(ROOT / "configs/vitg_lvd.yaml")


def plan(recipe: str, gpus: int, *overrides: str, samples: int | None = None) -> planning.Plan:
    return planning.plan_of(load_config(ROOT / f"configs/{recipe}.yaml", list(overrides)), gpus, H100, samples)


def test_the_largest_recipe_on_its_own_hardware_fits() -> None:
    found = plan("vitg_lvd", 64)
    assert found.fits
    assert found.hosts == 8
    assert found.statistic == 3072
    assert found.hours == pytest.approx(625_000 * found.forecast.seconds / 3600)
    assert found.images_per_second == pytest.approx(3072 / found.forecast.seconds)
    parameters = 1_141_000_000  # of ViT-g and its projector: fp32 values and two moments
    assert found.checkpoint == pytest.approx(12 * parameters, rel=0.01)


def test_averages_and_muon_change_a_checkpoint() -> None:
    plain = plan("vitg_lvd", 64).checkpoint
    assert plan("vitg_lvd", 64, "average.kind=ema").checkpoint == pytest.approx(4 / 3 * plain)
    muon = plan("vitg_lvd", 64, "engine.name=fsdp", "optim.name=muon").checkpoint
    assert plain * 2 / 3 < muon < 0.7 * plain  # nearly all of it is matrices of blocks, with one moment


def test_advice_for_what_does_not_fit_fits() -> None:
    """Every piece of advice is applied, as a user would, and looked at."""
    config = load_config(
        ROOT / "configs/vitg_lvd.yaml", ["engine.activation_checkpointing=none", "train.micro_batch=192"]
    )
    own = planning.plan_of(config, 16, H100)
    assert not own.fits
    found = planning.advice(config, 16, H100)
    assert found
    seen = set()
    for one in found:
        again = load_config(
            ROOT / "configs/vitg_lvd.yaml",
            ["engine.activation_checkpointing=none", "train.micro_batch=192", *one.overrides],
        )
        memory = step_memory(again, check_world(again, 16))
        assert memory.total == one.plan.memory.total <= H100.usable
        seen.add(tuple(sorted(text.partition("=")[0] for text in one.overrides)))
    assert len(seen) == len(found)  # of different kinds
    assert found[0].plan.forecast.seconds < 1.15 * min(one.plan.forecast.seconds for one in found)


def test_advice_for_what_fits_is_faster_and_keeps_the_objective() -> None:
    config = load_config(ROOT / "configs/vitg_lvd.yaml", ["engine.activation_checkpointing=full"])
    own = planning.plan_of(config, 64, H100)
    assert own.fits
    found = planning.advice(config, 64, H100)
    assert found
    for one in found:
        assert one.plan.forecast.seconds < own.forecast.seconds
        assert one.plan.statistic == own.statistic
    faster = {"engine.activation_checkpointing": "none"}
    assert planning._better(changed(config, faster), 64, H100, own) is not None
    assert planning._better(changed(config, faster | {"train.micro_batch": 24}), 64, H100, own) is None  # 1,536 at once


def test_what_cannot_fit_has_no_advice_and_says_so() -> None:
    small = planning.Assumptions(replace(machine("a100"), memory=1.2 * 2**30))
    config = load_config(ROOT / "configs/vitgigantic_lvd.yaml", ["train.micro_batch=1"])
    own = planning.plan_of(config, 8, small)
    assert not own.fits
    assert planning.advice(config, 8, small) == []
    said = plan_report.report("x", config, own, small, [])
    assert "DOES NOT FIT" in said
    assert "use more of them, or a smaller encoder" in said


def test_offloading_is_the_last_resort() -> None:
    """1.9 B parameters on one host: 16 bytes each are 3.5 GiB a rank of eight, which leave too little of 5."""
    small = planning.Assumptions(replace(machine("h100"), memory=5 * 2**30))
    config = load_config(ROOT / "configs/vitgigantic_lvd.yaml", ["train.micro_batch=1", "train.global_batch=64"])
    assert not planning.plan_of(config, 8, small).fits
    found = planning.advice(config, 8, small)
    assert found
    assert all("engine.cpu_offload=true" in one.overrides for one in found)
    assert found[0].plan.memory.host > 2**30


def test_a_table_keeps_the_batch() -> None:
    rows = planning.table(load_config(ROOT / "configs/vitg_lvd.yaml"), H100, [8, 64, 128, 1024, 2048])
    assert [row["GPUs"] for row in rows] == [8, 64, 128, 1024, 2048]
    assert [row.get("micro-batch") for row in rows] == ["48 x 8", "48 x 1", "24 x 1", "3 x 1", None]
    assert "cannot be split" in rows[-1]["cannot run"] or "is not" in rows[-1]["cannot run"]
    hours = [row["hours"] for row in rows[:-1]]
    assert hours == sorted(hours, reverse=True)
    columns = plan_report.as_table(rows).splitlines()
    assert len({len(line) for line in columns}) == 1
    assert columns[-1].split()[1] == "-"


def test_epochs_need_the_size_of_the_data() -> None:
    overrides = ("train.epochs=10", "train.global_batch=256", "train.micro_batch=32")
    assert plan("vitl_in1k", 8, *overrides).hours is None
    found = plan("vitl_in1k", 8, *overrides, samples=1_281_167)
    assert found.steps == 10 * 1_281_167 // 256


def test_the_report_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", VITG, "--gpus", "64"]) == 0
    said = capsys.readouterr().out
    found = plan("vitg_lvd", 64)
    assert f"{found.memory.total / 2**30:.1f} GiB of" in said
    assert f"{found.hours:,.3g} h" in said
    assert "64 ranks, between hosts" in said
    assert "Assumed (H100 SXM, DGX H100)" in said
    assert main(["plan", "--config", VITG, "--gpus", "64", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["memory"]["total"] == found.memory.total
    assert told["step"]["seconds"] == found.forecast.seconds
    assert sum(one["sent"] for one in told["traffic"]) == sum(one.sent for one in found.traffic)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--config is missing"),
        (["--config", VITG], "--gpus N (or --nodes N, of 8 GPUs each) is missing"),
        (["--config", VITG, "--gpus", "8", "--nodes", "1"], "say the same"),
        (["--config", VITG, "--gpus", "7"], "not train.micro_batch x ranks x accumulation"),
        (["--config", VITG, "--gpus", "8", "--chip", "v100"], "there are figures for a100"),
        (["--config", VITG, "--gpus", "8", "--write-rate", "0"], "--write-rate 0 must be more than 0"),
        (["--config", VITG, "--gpus", "8", "--trace"], "DeepSpeed looks at numbers"),
        (["--config", VITG, "--gpus", "8", "model.encoder=vit_huge"], "vit_huge"),
    ],
)
def test_mistakes(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    assert said in capsys.readouterr().err


def test_nodes_have_eight(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", VITG, "--nodes", "2", "--table"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[0] == "16"


def test_a_wrong_number_of_ranks_is_refused() -> None:
    with pytest.raises(UserError, match="runs one process"):
        plan("vitg_lvd", 8, "engine.name=single")
