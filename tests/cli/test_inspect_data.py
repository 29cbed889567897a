"""lejepa order and audit: the order without training, and what the audit finds in logs that are right and wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Command, small_config

from lejepa_scale.cli.main import main
from lejepa_scale.data.make import sources
from lejepa_scale.data.make.writer import write_shards

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process: (exit status, stdout, stderr)."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        status = main([*map(str, arguments)])
        out = capsys.readouterr()
        return status, out.out, out.err

    return run


@pytest.fixture
def config(command: Command, tmp_path: Path, scenes: Path) -> Path:
    train = {"steps": 14, "global_batch": 16}
    return command.config(small_config(tmp_path / "run", scenes, train=train, data={"log_keys": True}))


def test_order_prints_the_same_for_any_ranks_and_workers(inspect: Run, config: Path, tmp_path: Path) -> None:
    status, whole, _ = inspect("order", "--config", config, "--steps", "0:14")
    assert status == 0
    header, *lines = whole.splitlines()
    assert '"samples": [96]' in header
    rows = [line.split("\t") for line in lines]
    assert [(int(r[0]), int(r[1])) for r in rows] == [(p // 16, p) for p in range(14 * 16)]
    assert rows[0][6].startswith("shard-00000")
    assert len({r[6] for r in rows[:96]}) == 96
    for options in (("--world-size", 4, "--workers", 3), ("--world-size", 2, "--workers", 1, "train.micro_batch=4")):
        assert inspect("order", "--config", config, "--steps", ":14", *options)[1] == whole
    part = inspect("order", "--config", config, "--world-size", 2, "--steps", "3:5")[1]
    assert part.splitlines()[1:] == lines[48:80]
    assert not (tmp_path / "run").exists()


def test_audit_of_a_run(inspect: Run, command: Command, config: Path, tmp_path: Path) -> None:
    """Trained, and compared with what was computed. An image that does not decode is named with its neighbour."""
    scenes = sources.scenes(96, 32, 0, "png", 90)
    damaged = (replace(s, image=b"no image") if s.key == "00000037" else s for s in scenes.samples)
    write_shards(damaged, tmp_path / "s", per_shard=32, total=96, classes=scenes.classes, description={})
    config.write_text(re.sub(r"shards: .*", f"shards: {tmp_path / 's'}", config.read_text()))
    expected = tmp_path / "expected.tsv"
    expected.write_text(inspect("order", "--config", config, "--steps", "0:14")[1])
    result = command(ROOT / "launchers/train.py", "--config", config)
    assert result.returncode == 0, result.stderr
    status, out, _ = inspect("audit", tmp_path / "run")
    assert (status, out.splitlines()[-1]) == (0, "clean: every sample once")
    assert "224 samples in steps 0 to 13; 224 of source 0 in epochs 0 to 2; written by 1 starts" in out
    assert "0:1:5 shard-000001.tar/00000037 (epoch 0), replaced by 00000038" in out
    status, out, _ = inspect("audit", expected, tmp_path / "run")
    assert (status, out.splitlines()[-1]) == (0, "clean: the same samples at the same positions")


def test_audit_names_what_is_wrong(inspect: Run, config: Path, tmp_path: Path) -> None:
    whole = inspect("order", "--config", config, "--steps", "0:14")[1].splitlines(keepends=True)
    log = tmp_path / "log.tsv"

    def audit(lines: list[str], *more: Any) -> str:
        log.write_text("".join(lines))
        status, out, _ = inspect("audit", log, *more)
        found = [line for line in out.splitlines() if line.startswith("FAULT")]
        assert status == (1 if found else 0)
        return "\n".join(found)

    name = [line.rstrip("\n").split("\t")[-1] for line in whole]
    assert audit(whole) == ""
    assert audit([*whole, *whole[100:120]]) == ""  # taken again after a restart
    assert audit([*whole, "13\t12"]) == ""  # half a line, from a kill
    gone = audit(whole[:50] + whole[51:])
    assert "1 of the 224 positions did not come: position 49 of step 3" in gone
    assert f"1 of the 96 samples of source 0 did not come in epoch 0, among them {name[50]}" in gone
    assert "16 of the 224 positions did not come: positions 32 to 47 of step 2" in audit(whole[:33] + whole[49:])
    other = "\t".join([*whole[50].split("\t")[:2], *whole[60].split("\t")[2:]])
    swapped = audit([*whole[:50], other, *whole[51:]])
    assert f"{name[60]} (epoch 0) at positions 49 and 59" in swapped
    assert f"among them {name[50]}" in swapped
    other = "\t".join([*whole[20].split("\t")[:2], *whole[22].split("\t")[2:]])
    assert "position 19 was consumed twice, and not as the same sample" in audit([*whole, other])
    assert '"global_batch' not in audit([*whole, whole[0].replace('"seed": 0', '"seed": 1')])
    assert "seed: 0 -> 1" in audit([*whole, whole[0].replace('"seed": 0', '"seed": 1')])
    assert "positions outside their step" in audit([*whole, "3" + whole[-1][2:].replace("223", "224", 1)])

    right = tmp_path / "right.tsv"
    right.write_text("".join(whole))
    assert audit(whole, right) == ""
    assert f"at position 19 {log} has 0:" in audit([*whole[:20], other, *whole[21:]], right)
    assert f"{log} has nothing at position 208 of step 13" in audit(whole[:-16], right)
    assert audit(whole[:-16], right, "--steps", "0:13") == ""


def test_what_cannot_be_read_says_so(inspect: Run, config: Path, tmp_path: Path, capsys: Any) -> None:
    status, _, err = inspect("audit", tmp_path)
    assert status == 2
    assert "data.log_keys=true" in err
    (tmp_path / "x.tsv").write_text("# {}\n")
    status, _, err = inspect("audit", tmp_path / "x.tsv")
    assert status == 2
    assert "x.tsv, line 1 is not a line of a key log" in err
    order = inspect("order", "--config", config, "--steps", "0:1")[1]
    (tmp_path / "x.tsv").write_text(order.partition("\n")[2])
    status, _, err = inspect("audit", tmp_path / "x.tsv")
    assert status == 2
    assert "x.tsv, line 1: records come after a header" in err
    (tmp_path / "x.tsv").write_text(order.partition("\n")[0] + "\n")
    status, _, err = inspect("audit", tmp_path / "x.tsv")
    assert status == 2
    assert "holds no sample" in err
    status, _, err = inspect("order", "--config", config, "--world-size", 3, "--steps", "0:1")
    assert status == 2
    assert "train.global_batch = 16 cannot be split over 3 ranks" in err
    with pytest.raises(SystemExit):
        inspect("order", "--config", config, "--steps", "5:5")
    assert "must read a:b" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        inspect("audit", "--help")
    assert "order.tsv runs/vitg" in capsys.readouterr().out
