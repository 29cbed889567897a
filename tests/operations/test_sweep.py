"""A sweep: its grid, its runs for real, going on, failures, and stopping."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import Command, script_environment, small_config

from lejepa_scale.checkpoint.metrics import read_metrics
from lejepa_scale.cli.main import main
from lejepa_scale.config import load_config
from lejepa_scale.data import open_mixture
from lejepa_scale.errors import UserError
from lejepa_scale.operations import sweep


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-3", ["1e-3"]),
        ("0.1,0.2", ["0.1", "0.2"]),
        ("[0.9,0.95],[0.9,0.99]", ["[0.9,0.95]", "[0.9,0.99]"]),
        ("train-{000..009,020}.tar", ["train-{000..009,020}.tar"]),
        ("[{shards: a, weight: 2},{shards: b}]", ["[{shards: a, weight: 2},{shards: b}]"]),
        ("'a,b',c", ["'a,b'", "c"]),
    ],
)
def test_commas_between_values_make_the_grid(text: str, values: list[str]) -> None:
    assert sweep.values_of_an_override(text) == values


def test_every_combination_is_a_run(command: Command, tmp_path: Path) -> None:
    recipe = command.config(small_config("elsewhere", "shards"))
    out = tmp_path / "out"
    points = sweep.grid(
        recipe, ["objective.lambda=0.01,0.02", "optim.betas=[0.9,0.95],[0.8,0.9]", "train.steps=7"], out
    )
    assert [point.name for point in points] == [
        "lambda=0.01_betas=0.9-0.95",
        "lambda=0.01_betas=0.8-0.9",
        "lambda=0.02_betas=0.9-0.95",
        "lambda=0.02_betas=0.8-0.9",
    ]
    assert [point.config.objective.lambda_ for point in points] == [0.01, 0.01, 0.02, 0.02]
    assert {point.config.train.steps for point in points} == {7}
    assert points[1].dir == out / points[1].name
    two = sweep.grid(recipe, ["data.views.global.size=32,48", "data.views.local.size=16"], out)
    assert [point.name for point in two] == ["size=32", "size=48"]
    both = sweep.grid(recipe, ["data.views.global.size=32,48", "data.views.local.size=16,32"], out)
    assert both[0].name == "data.views.global.size=32_data.views.local.size=16"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optim.lr=1e-3,1e-3"], "a value is there twice"),
        (["optim.lr=1e-3,,1e-2"], "a value is missing"),
        (["optim.lr=1e-3,-1"], r"run lr=-1 of the sweep: .*optim.lr"),
        (["optim.lrr=1,2"], "unknown key optim.lrr, did you mean optim.lr"),
        (["run.dir=a,b"], "--out says"),
        (["run.license=a b,a-b"], "two runs of the sweep would be license=a-b"),
    ],
)
def test_what_cannot_be_a_grid_is_refused(command: Command, tmp_path: Path, overrides: list[str], said: str) -> None:
    recipe = command.config(small_config("elsewhere", "shards"))
    with pytest.raises(UserError, match=said):
        sweep.grid(recipe, overrides, tmp_path)


def steps_of(run: Path) -> list[int]:
    return [int(record["step"]) for record in read_metrics(run / "metrics.jsonl")]


def test_runs_are_made_ranked_and_left_alone_when_finished(
    command: Command, tmp_path: Path, scenes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of three fails: the others are there all the same. The same command goes on; a longer run too."""
    recipe = command.config(small_config("elsewhere", scenes, train={"steps": 2}))
    out = tmp_path / "out"
    words = ["sweep", "--config", str(recipe), "--out", str(out), "--jobs", "2"]
    grid = ["objective.lambda=0.02,0.1", "train.steps=2"]
    assert main([*words, "--dry-run", *grid]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{out}/lambda={x}: 2 steps" for x in (0.02, 0.1)]
    assert not out.exists()
    assert main([*words, *grid]) == 0
    said = capsys.readouterr()
    assert "has the smallest loss / lambda^0.4" in said.out
    assert "lambda=0.02: " in said.err
    assert [steps_of(out / f"lambda={x}") for x in (0.02, 0.1)] == [[1, 2]] * 2
    assert yaml.safe_load((out / "lambda=0.1/config.yaml").read_text())["objective"]["lambda"] == 0.1
    assert json.loads((out / "sweep.json").read_text())["runs"] == ["lambda=0.02", "lambda=0.1"]
    assert not (out / "lock").exists()

    before = (out / "lambda=0.1/metrics.jsonl").stat().st_mtime_ns
    found = sweep.sweep(recipe, grid, out)
    assert found.finished == ["lambda=0.02", "lambda=0.1"]
    assert (out / "lambda=0.1/metrics.jsonl").stat().st_mtime_ns == before

    with pytest.raises(UserError, match=r"holds a run of other settings: optim\.lr = 0\.0005, not 0\.1"):
        sweep.sweep(recipe, [*grid, "optim.lr=0.1"], out)


@pytest.mark.slow
def test_a_run_that_fails_stops_no_other(
    command: Command, tmp_path: Path, scenes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = command.config(small_config("elsewhere", scenes, train={"steps": 1}))
    out = tmp_path / "out"
    words = ["sweep", "--config", str(recipe), "--out", str(out), f"data.shards={tmp_path / 'none'},{scenes}"]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "failed" in said
    assert str(tmp_path / "none") in said
    assert len(list((out / "logs").glob("*.log"))) == 2
    done = [path for path in out.glob("shards=*") if (path / "metrics.jsonl").exists()]
    assert [steps_of(path) for path in done] == [[1]]


@pytest.mark.slow
def test_a_signal_lets_runs_save_and_the_same_command_goes_on(command: Command, tmp_path: Path, scenes: Path) -> None:
    recipe = command.config(small_config("elsewhere", scenes, train={"steps": 60}))
    out = tmp_path / "out"
    words = ["sweep", "--config", str(recipe), "--out", str(out), "--jobs", "2", "objective.lambda=0.02,0.1,0.2"]
    start = [sys.executable, "-m", "lejepa_scale", *words]
    process = subprocess.Popen(start, env=script_environment(), stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not all(steps_of(out / f"lambda={x}")[5:] for x in (0.02, 0.1)):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "stopped: 0 of 3 runs are finished" in said
    assert not (out / "lambda=0.2").exists()
    stands = steps_of(out / "lambda=0.1")[-1]
    assert 5 < stands < 60
    found = sweep.sweep(recipe, words[words.index("2") + 1 :], out, jobs=2)
    assert found.finished == ["lambda=0.02", "lambda=0.1", "lambda=0.2"]
    for x in (0.02, 0.1, 0.2):
        assert steps_of(out / f"lambda={x}") == list(range(1, 61))


@pytest.mark.slow
def test_runs_of_two_ranks(command: Command, tmp_path: Path, scenes: Path) -> None:
    recipe = command.config(small_config("elsewhere", scenes, train={"steps": 1}, engine={"name": "ddp"}))
    out = tmp_path / "out"
    assert sweep.sweep(recipe, ["optim.lr=1e-3,2e-3"], out, ranks=2).finished == ["lr=1e-3", "lr=2e-3"]
    state = json.loads((out / "lr=1e-3/checkpoints/step_00000001/state.json").read_text())
    assert state["ranks"] == 2
    with pytest.raises(UserError, match="cannot be split over 3 ranks"):
        sweep.grid(recipe, ["optim.lr=1e-3,2e-3"], out, ranks=3)


@pytest.mark.unchecked  # a stand-in for the signal
def test_a_run_that_does_not_stop_is_killed(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A program in place of a run, which takes SIGTERM for nothing."""
    monkeypatch.setattr(sweep, "_GRACE", 1.0)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(30)"
    log = tmp_path / "log"
    (point,) = sweep.grid(command.config(small_config("elsewhere", "shards")), ["train.steps=2"], tmp_path)

    class Asked:
        @property
        def asked(self) -> bool:
            return log.exists() and log.stat().st_size > 0

    def start(point: sweep.Point, devices: str | None, jobs: int) -> sweep._Running:
        file = log.open("ab")
        return sweep._Running(point, subprocess.Popen([sys.executable, "-c", deaf], stdout=file), file, devices)

    outcome, began = sweep.Outcome(), time.monotonic()
    sweep._work([point], [None], start, Asked(), outcome, {point.name: 0}, lambda steps: None)  # type: ignore[arg-type]
    assert time.monotonic() - began < 15
    assert outcome.stopped
    assert "1 runs have not stopped in 1 s, and are killed" in caplog.text


def test_a_run_whose_configuration_cannot_be_read_is_named(command: Command, tmp_path: Path) -> None:
    recipe = command.config(small_config("elsewhere", "shards"))
    (tmp_path / "out/run").mkdir(parents=True)
    for text in ("run: [", "a list"):
        (tmp_path / "out/run/config.yaml").write_text(text)
        with pytest.raises(UserError, match=r"out/run/config\.yaml"):
            sweep.sweep(recipe, ["train.steps=2"], tmp_path / "out")


def in_epochs(command: Command, scenes: Path) -> Path:
    """96 scenes in batches of 16: an epoch is 6 steps."""
    tree = small_config("elsewhere", scenes)
    tree["train"] = {"global_batch": 16, "epochs": 100}
    return command.config(tree)


def test_a_dry_run_says_how_many_steps_epochs_are(
    command: Command, tmp_path: Path, scenes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = in_epochs(command, scenes), tmp_path / "out"
    open_mixture(load_config(recipe).data)  # which indexes it
    words = [
        "sweep",
        "--config",
        str(recipe),
        "--out",
        str(out),
        "--dry-run",
        f"data.shards={scenes},{tmp_path / 'no'}",
    ]
    assert main([*words, "train.epochs=0.4"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(": 0.4 epochs = 2 steps")
    assert second.endswith(": 0.4 epochs (how many steps is known once the data is indexed)")
    assert main([*words, "train.steps=3"]) == 0
    assert all(line.endswith(": 3 steps") for line in capsys.readouterr().out.splitlines())
    points = sweep.grid(recipe, ["train.epochs=0.1,1"], out)
    with pytest.raises(
        UserError, match=r"run epochs=0\.1 of the sweep: train\.epochs = 0\.1 is less than a step: 0\.6 "
    ):
        sweep.with_steps(points)


@pytest.mark.slow
def test_runs_whose_steps_the_data_decides(command: Command, tmp_path: Path, scenes: Path) -> None:
    recipe, out = in_epochs(command, scenes), tmp_path / "out"
    grid, names = ["optim.lr=1e-3,2e-3", "optim.warmup_steps=1 step"], ["lr=1e-3", "lr=2e-3"]
    for _ in range(2):
        assert sorted(sweep.sweep(recipe, [*grid, "train.epochs=0.4"], out, jobs=2).finished) == names
        assert [steps_of(out / name) for name in names] == [[1, 2]] * 2
    points = sweep.with_steps(sweep.grid(recipe, [*grid, "train.images=48"], out))
    assert [(point.steps, point.done) for point in points] == [(3, 2)] * 2
    assert sorted(sweep.sweep(recipe, [*grid, "train.images=48"], out, jobs=2).finished) == names
    assert [steps_of(out / name) for name in names] == [[1, 2, 3]] * 2
