"""The lejepa command as a person meets it: help that teaches, wrong words refused with the right ones, no slow start."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Command, small_config

from lejepa_scale.cli.command import Command as Definition
from lejepa_scale.cli.command import Group, expect_writable, refuse, start
from lejepa_scale.cli.main import LEJEPA, main
from lejepa_scale.errors import UserError
from lejepa_scale.operations.versions import TORCH_TRIED


def every(group: Group) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for command in group.commands:
        inner = every(command) if isinstance(command, Group) else []
        found += [(command.name,), *((command.name, *words) for words in inner)]
    return found


def test_the_commands_are_those_of_the_contract() -> None:
    promised = {"train", "evaluate", "convert", "shards make", "shards index", "order", "audit", "picture"}
    assert promised <= {" ".join(words) for words in every(LEJEPA)}


@pytest.mark.parametrize("words", every(LEJEPA), ids=" ".join)
def test_every_command_has_help(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status: Any = main([*words, "--help"])
    except SystemExit as left:
        status = left.code
    out = capsys.readouterr().out
    assert status == 0
    assert out.startswith(f"usage: lejepa {' '.join(words)} ")
    (command,) = (c for c in _definitions(LEJEPA) if c[0] == words)
    if isinstance(command[1], Definition):
        assert f"  lejepa {' '.join(words)} " in out  # an example to copy
        assert "--" in out


def _definitions(group: Group, before: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Definition | Group]]:
    found: list[tuple[tuple[str, ...], Definition | Group]] = []
    for command in group.commands:
        words = (*before, command.name)
        found += [(words, command), *(_definitions(command, words) if isinstance(command, Group) else [])]
    return found


@pytest.mark.parametrize(
    ("words", "needles"),
    [
        (["trian"], ["'trian'", "did you mean `lejepa train`?", "evaluate", "--help"]),
        (["make"], ["did you mean `lejepa shards make`?"]),
        (["shards", "idnex"], ["did you mean `lejepa shards index`?"]),
        (["shards", "make", "sinthetic"], ["did you mean `lejepa shards make synthetic`?", "torchvision"]),
        (["qqqq"], ["has no command 'qqqq'.", "train"]),
        (["train"], ["--config is missing", "quickstart", "2 CPU cores", "vitg_lvd"]),
        (["train", "--config", "quickstrat"], ["no recipe of that name", "did you mean quickstart?", "vitg_lvd"]),
        (["train", "--config", "nowhere/quickstart.yaml"], ["no such file", "The recipe is --config quickstart"]),
        (["train", "--config", "quickstart", "optim.rl=1"], ["optim.rl", "optim.lr"]),
        (["train", "--config", "quickstart", "--setps"], ["--setps", "lejepa train --help"]),
        (["evaluate", "nowhere", "--train", "a", "--test", "b"], ["nowhere", "run directory"]),
        (["evaluate", "nowhere"], ["--train, --test", "lejepa evaluate --help"]),
        (["evaluate", "nowhere", "--train", "a", "--test", "b", "--k", "0"], ["k=0"]),
        (["evaluate", "nowhere", "--train", "a", "--test", "b", "--device", "cdua"], ["cdua"]),
        (["convert", "nowhere", "x.safetensors"], ["nowhere", "run directory"]),
        (["convert", "nowhere", "x", "--to", "onxn"], ["onxn", "safetensors"]),
        (["shards", "make", "synthetic", "--out", "x", "--count", "0"], ["--count", "'0'", "at least 1"]),
        (["shards", "make", "folder", "nowhere", "--out", "x", "--per-shard", "-3"], ["--per-shard", "at least 1"]),
        (["shards", "index", "nowhere/*.tar"], ["nowhere/*.tar"]),
        (["shards", "index", "x.tar", "--job", "3/3"], ["'3/3'", "for instance 0/64"]),
        (["order", "--config", "quickstart"], ["--steps"]),
        (["order", "--config", "quickstart", "--steps", "3"], ["must read a:b"]),
        (["order", "--config", "quickstart", "--steps", "0:1", "data.shards=gone.tar"], ["gone.tar"]),
        (["audit", "a", "b", "c"], ["one log or two, not 3"]),
        (["picture", "nowhere", "--shards", "x", "--out", "p.png"], ["nowhere", "run directory"]),
        (["picture", "nowhere", "--shards", "x", "--out", "p.png", "--images", "none"], ["--images", "at least 1"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_in_one_paragraph(
    words: list[str], needles: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status: Any = main(words)
    except SystemExit as left:
        status = left.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    said, paragraph = captured.err.rsplit("error: ", 1)
    assert "error" not in said
    assert "Traceback" not in captured.err
    assert not list(tmp_path.iterdir())
    for needle in needles:
        assert needle in paragraph


def test_no_command_at_all_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert out.count("usage: lejepa COMMAND") == 2
    # each line of the first session names a command and options that are there
    for line in re.findall(r"^  (lejepa .*)$", out, re.MULTILINE):
        words = line.split()[1:]
        (command,) = [d for w, d in _definitions(LEJEPA) if w == tuple(words[: len(w)]) and isinstance(d, Definition)]
        parser = __import__("argparse").ArgumentParser()
        command.add_arguments(parser)
        parser.parse_intermixed_args(words[3 if words[0] == "shards" else 1 :])


def test_version_says_what_is_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    rows = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert rows["torch"] == version("torch")
    assert rows["webdataset"] == version("webdataset")
    assert rows["python"] == ".".join(map(str, sys.version_info[:3]))
    assert rows["tried"].startswith(f"with torch {TORCH_TRIED[0]} and {TORCH_TRIED[1]}: the whole test suite")
    assert set(rows) >= {"lejepa_scale", "torchvision", "timm", "deepspeed", "xformers", "torchao"}


def test_version_says_what_is_absent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("lejepa_scale.operations.versions._LIBRARIES", ("torch", "no-such-library"))
    assert main(["--version"]) == 0
    assert re.search(r"^no-such-library\s*absent$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["train", "--config", "quickstart", "--print-config"],
        ["train", "--config", "quickstart", "optim.rl=1"],
        ["order", "--config", "quickstart", "--steps", "0:1", "optim.rl=1"],
        ["trian"],
    ],
    ids=" ".join,
)
def test_torch_is_not_imported_for_words(words: list[str]) -> None:
    program = (
        "import sys, lejepa_scale.cli.main\n"
        f"try: lejepa_scale.cli.main.main({words!r})\n"
        "except SystemExit: pass\n"
        "print('TORCH', 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("TORCH False False\n"), done.stderr


def test_public_names_without_torch_until_they_are_used() -> None:
    import lejepa_scale
    from lejepa_scale.objective import SIGReg

    assert lejepa_scale.SIGReg is SIGReg
    assert set(lejepa_scale.__all__) == {*lejepa_scale._ROOMS, "__version__"}
    assert set(lejepa_scale.__all__) <= set(dir(lejepa_scale))
    for name in lejepa_scale.__all__:
        assert getattr(lejepa_scale, name) is not None
    with pytest.raises(AttributeError, match="SIGRge"):
        _ = lejepa_scale.SIGRge  # type: ignore[attr-defined]
    program = "import sys, lejepa_scale; lejepa_scale.load_config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_all_ranks_is_said_once(
    everywhere: bool, rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("RANK", str(rank))
    error = UserError("it is wrong.")
    error.everywhere = everywhere
    assert refuse(error) == 2
    said = {(True, 0): "error: it is wrong.\n", (False, 0): "error: it is wrong.\n", (True, 1): ""}
    assert capsys.readouterr().err == said.get((everywhere, rank), "error on rank 1: it is wrong.\n")
    assert bool(waited) == (everywhere and rank == 1)  # or torchrun ends rank 0 before it has spoken


def test_a_reader_that_closes_early_is_no_error(command: Command, tmp_path: Path, scenes: Path) -> None:
    """`lejepa order ... | head -1`: one line, no traceback, status 0."""
    path = command.config(small_config(tmp_path / "run", scenes, train={"steps": 4000, "global_batch": 16}))
    words = [sys.executable, "-m", "lejepa_scale", "order", "--config", str(path), "--steps", "0:4000"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("# ")
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/a/b"), 1, "/a/b: No such file or directory."),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), 2, "/a/b: Permission denied."),
        (OSError(errno.EIO, "Input/output error", "/a/b"), 1, "/a/b: Input/output error."),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device."),
        (OSError(errno.EXDEV, "Invalid link", "/a", None, "/b"), 1, "/a to /b: Invalid link."),
    ],
)
def test_what_the_system_refuses_is_one_line(
    capsys: pytest.CaptureFixture[str], error: OSError, status: int, said: str
) -> None:
    def fails(_: argparse.Namespace) -> int:
        raise error

    assert start(Definition("x", "", "", lambda _: None, fails), [], "lejepa") == status
    assert capsys.readouterr().err == f"error: {said}\n"


def test_what_says_nothing_of_a_file_has_its_traceback() -> None:
    def fails(_: argparse.Namespace) -> int:
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    with pytest.raises(ConnectionResetError):
        start(Definition("x", "", "", lambda _: None, fails), [], "lejepa")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    words = ["shards", "make", "synthetic", "--count", "2", "--size", "16", "--out", str(tmp_path / "file/set")]
    assert main(words) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/file/set: Not a directory.\n"


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "e", "--train", "t", "--test", "t", "--json", "OUT.json"],
        ["evaluate", "e", "--train", "t", "--test", "t", "--out", "OUT"],
        ["embed", "e", "--images", "t", "--out", "OUT.safetensors"],
        ["picture", "e", "--shards", "t", "--out", "OUT.html"],
        ["select", "runs", "--json", "OUT.json"],
        ["select", "runs", "--against", "knn", "--plot", "OUT.png"],
    ],
    ids=" ".join,
)
def test_where_results_cannot_go_is_said_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """The encoder, shards and runs are not there either: nobody has looked for them."""
    (tmp_path / "file").touch()
    assert main([word.replace("OUT", str(tmp_path / "file/x/out")) for word in words]) == 2
    assert f"{tmp_path}/file is no folder" in capsys.readouterr().err


def test_where_a_file_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").touch()
    expect_writable(None, tmp_path / "old", tmp_path / "new", tmp_path / "a/b/new", Path("new"))
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    with pytest.raises(UserError, match="is a folder: name a file"):
        expect_writable(tmp_path)
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append((Path(path), mode)) is None and False)
    for name, where, mode in (("old", "old", os.W_OK), ("a/new", ".", os.W_OK | os.X_OK)):
        with pytest.raises(UserError, match=f"{name} cannot be written"):
            expect_writable(tmp_path / name)
        assert asked.pop() == (tmp_path / where, mode)
    monkeypatch.setenv("RANK", "1")  # rank 0 writes
    expect_writable(tmp_path / "new")


def test_the_module_under_a_launcher(command: Command, tmp_path: Path, scenes: Path) -> None:
    """torchrun -m lejepa_scale train: two ranks train; a wrong key is said once."""
    run = tmp_path / "run"
    path = command.config(small_config(run, scenes, train={"steps": 1}, engine={"name": "ddp"}))
    wrong = command("-m", "lejepa_scale", "train", "--config", path, "optim.rl=1", ranks=2, launcher="torchrun")
    assert wrong.returncode != 0
    assert [line for line in wrong.stderr.splitlines() if line.startswith("error")] == [
        f"error: {path} with optim.rl=1: unknown key optim.rl, did you mean optim.lr?"
    ]
    result = command("-m", "lejepa_scale", "train", "--config", path, ranks=2, launcher="torchrun")
    assert result.returncode == 0, result.stderr
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1]


def test_deepspeeds_word_before_the_command_is_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--local_rank=1", "train", "--config", "quickstart", "--print-config"]) == 0
    assert main(["train", "--local_rank=1", "--config", "quickstart", "--print-config"]) == 0
    first, second = capsys.readouterr().out.split("run:\n")[1:]
    assert first == second
    assert "encoder: resnet10t" in first


FILES = {
    "launchers/train.py": "train",
    "tools/evaluate.py": "evaluate",
    "tools/convert_checkpoint.py": "convert",
    "tools/make_shards.py": "shards make",
    "tools/index_shards.py": "shards index",
    "tools/visualize.py": "picture",
    "tools/sweep.py": "sweep",
    "tools/select_runs.py": "select",
    "tools/inspect_data.py": "",
}


@pytest.mark.parametrize("file", FILES)
def test_files_of_a_checkout_are_the_same_commands(command: Command, file: str) -> None:
    result = command(ROOT / file, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: lejepa {FILES[file]}".rstrip())
