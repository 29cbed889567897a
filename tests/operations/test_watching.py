"""A run on a screen, from files made by hand and from a run that has trained."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from conftest import small_config

from lejepa_scale import logs
from lejepa_scale.cli.main import main
from lejepa_scale.config import dump, validate
from lejepa_scale.operations import watching
from lejepa_scale.training import loop
from lejepa_scale.training.monitor import FILE, PARTS


def made_up(run: Path) -> None:
    run.mkdir()
    config = validate(small_config(run, "s", train={"steps": 1000}, engine={"name": "ddp"}))
    (run / "config.yaml").write_text(dump(config))
    records = [
        {"step": step, "loss": 2 - step / 1000, "images_per_second": 400.0, "step_seconds": 0.5, "skipped_images": 3}
        for step in range(10, 510, 10)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    hosts, ranks = [f"node{rank // 2}" for rank in range(6)], []
    for rank in range(6):
        parts = dict.fromkeys(PARTS, 0.01) | {"other ranks": 0.2 * (rank < 4), "data wait": 0.3 * (rank == 5)}
        ranks.append([*parts.values(), 0.5, 40.0 + rank, 2.0])
    told = {"step": 500, "time": time.time() - 7, "hosts": hosts, "of_ranks": ranks}
    (run / FILE).write_text(json.dumps(told))
    (run / "train.log").write_text("".join(f"line {i}\n" for i in range(100)))


def test_all_of_it(tmp_path: Path) -> None:
    made_up(tmp_path / "run")
    text = watching.screen(tmp_path / "run")
    assert "ended" in text  # nobody holds its lock
    assert "step 500 of 1,000 (50%); 400 images/s" in text
    loss = next(line for line in text.splitlines() if line.startswith("loss"))
    assert loss.split()[1] == loss.split()[1][0] * 0 + watching.curve([2 - step / 1000 for step in range(10, 510, 10)])
    assert loss.split()[1][0] == "█"
    assert loss.split()[1][-1] == "▁"
    hosts = [line.split() for line in text.splitlines() if line.strip().startswith("node")]
    assert [row[0] for row in hosts] == ["node2", "node0", "node1"]  # that others wait for stands first
    assert hosts[0][1] == "4-5"
    assert "45.0" in hosts[0]
    assert "slow: the other ranks wait 0.2 s of a step of 0.5 s for node2 (ranks 4, 5)" in text
    assert "(step 500, 7 s ago)" in text
    assert "3 images replaced" in text
    assert text.splitlines()[-1] == "  line 99"
    assert "line 93" not in text


def test_curves() -> None:
    assert watching.curve([1, 2, 3, 4, 5, 6, 7, 8]) == "▁▂▃▄▅▆▇█"
    assert watching.curve([5.0, 5.0]) == "▁▁"
    assert watching.curve([0, 0, 7, 7], columns=2) == "▁█"
    assert len(watching.curve(list(range(1000)))) == 40


def test_a_run_that_has_trained(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    logs.to_stderr()
    with logs.kept(run):
        loop.train(validate(small_config(run, scenes)))
    capsys.readouterr()
    assert main(["watch", str(run), "--once"]) == 0
    text = capsys.readouterr().out
    assert "finished" in text
    assert "step 4 of 4 (100%)" in text
    assert "seconds of a step" in text
    assert "train.log:" in text
    assert "vit_nano" in text  # what the run says of itself


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path / "nothing"), "--once"]) == 2
    assert "nothing is no run: it has no config.yaml." in capsys.readouterr().err
