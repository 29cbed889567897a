"""`lejepa runs`: every state that a run can be in, from what it left."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import small_config

from lejepa_scale.cli.main import main
from lejepa_scale.errors import UserError
from lejepa_scale.operations.runs import runs_in, standing, standings
from lejepa_scale.training import lock
from lejepa_scale.training.lock import locked


def a_run(path: Path, left: str = "", records: int = 3, **sections: dict[str, object]) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(small_config(path, "s", **sections)))
    lines = [{"step": step, "loss": 2.0 / step, "images_per_second": 100.0 * step} for step in range(1, records + 1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if left:
        (path / "exit_status").write_text(f"{left}\n")
    return path


@pytest.mark.parametrize(
    ("left", "state"), [("0", "finished"), ("75", "stopped"), ("", "ended"), ("nonsense", "ended")]
)
def test_what_is_over_says_how(tmp_path: Path, left: str, state: str) -> None:
    found = standing(a_run(tmp_path / "a", left))
    assert (found.state, found.step, found.steps, found.images_per_second) == (state, 3, "4", 300.0)
    assert found.loss == pytest.approx(2 / 3)
    assert found.age is not None
    assert found.age < 60


def test_what_trains_shows_by_its_lock(tmp_path: Path) -> None:
    run = a_run(tmp_path / "a", "75")  # of the start before
    with locked(run):
        found = standing(run)
        assert found.state == "running"
        assert f"process {os.getpid()} on " in found.where
        mine = json.loads((run / "lock").read_text())
        (run / "lock").write_text(json.dumps(mine | {"begun": "1"}))  # another process of that number
        assert standing(run).state == "silent"
        (run / "lock").write_text(json.dumps(mine | {"host": "elsewhere"}))
        assert standing(run).state == "running"  # a beat just now
        then = time.time() - lock.WATCH_SECONDS - 1
        os.utime(run / "lock", (then, then))
        assert standing(run).state == "silent"
        (run / "lock").write_text(json.dumps(mine))
    assert standing(run).state == "stopped"


def test_the_best_score_is_that_of_evaluations_else_of_the_probe(tmp_path: Path) -> None:
    run = a_run(tmp_path / "a")
    assert standing(run).score is None
    with (run / "metrics.jsonl").open("a") as file:
        for step, accuracy in ((4, 0.3), (5, 0.5), (6, None), (7, 0.4)):
            file.write(json.dumps({"step": step, "loss": 1.0, "probe_accuracy": accuracy}) + "\n")
    assert (standing(run).metric, standing(run).score) == ("probe_accuracy", 0.5)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 7, "eval_knn": 0.25}) + "\n")
    assert (standing(run).metric, standing(run).score, standing(run).loss) == ("eval_knn", 0.25, 1.0)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 8, "eval_knn": 0.75, "eval_average_knn": 0.5}) + "\n")
    assert (standing(run).metric, standing(run).score) == ("eval_average_knn", 0.5)  # its encoder is the average


def test_runs_are_found_below_and_checkpoints_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "group/two", "group/deep/three"):
        a_run(tmp_path / name, "0", train={"steps": None, "epochs": 3} if name == "one" else {})
    checkpoint = tmp_path / "one/checkpoints/step_00000003"
    checkpoint.mkdir(parents=True)
    for name in ("config.yaml", "state.json"):
        (checkpoint / name).write_text("{}")
    assert [run.name for run in runs_in([tmp_path])] == ["three", "two", "one"]
    assert [run.name for run in runs_in([tmp_path / "one", tmp_path])] == ["one", "three", "two"]
    assert main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "state", "step", "of", "img/s", "last", "record", "loss", "score"]
    assert "3 epochs" in lines[3]
    assert main(["runs", str(tmp_path), "--json"]) == 0
    assert [one["state"] for one in json.loads(capsys.readouterr().out)] == ["finished"] * 3


def test_what_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="holds no run"):
        runs_in([tmp_path / "nothing"])
    assert main(["runs", str(tmp_path)]) == 2
    assert f"{tmp_path} holds no run" in capsys.readouterr().err
    run = a_run(tmp_path / "a", records=0)
    assert (standing(run).step, standing(run).age, standing(run).loss) == (0, None, None)
    with pytest.raises(UserError, match="b is no run: it has no config"):
        standing(tmp_path / "b")


@pytest.mark.parametrize("file", ["config.yaml", "metrics.jsonl", "lock", "exit_status"])
def test_a_run_that_cannot_be_read_hides_none_of_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], unreadable: Callable[[Path], None], file: str
) -> None:
    for name in ("a", "b"):
        a_run(tmp_path / name, "0")
    unreadable(tmp_path / "a" / file)
    assert main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[1:3]] == ["unreadable", "finished"]
    assert lines[3].startswith(f"{tmp_path}/a: ")
    assert f"{tmp_path}/a/{file} cannot be read" in lines[3]
    with pytest.raises(UserError, match=f"a/{file} cannot be read"):
        standing(tmp_path / "a")


def test_a_lock_that_cannot_be_read_gives_no_leave_to_roll_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], unreadable: Callable[[Path], None]
) -> None:
    unreadable(a_run(tmp_path / "a") / "lock")
    assert main(["rollback", str(tmp_path / "a")]) == 2
    assert "a/lock cannot be read: Permission denied" in capsys.readouterr().err


def test_a_damaged_configuration_hides_no_other_run(tmp_path: Path) -> None:
    for name in ("a", "b"):
        a_run(tmp_path / name, "0")
    (tmp_path / "a/config.yaml").write_bytes(b"run: \x00\x00")
    assert [one.state for one in standings(runs_in([tmp_path]))] == ["unreadable", "finished"]
