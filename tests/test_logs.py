"""What the library has to say goes through `logging`; who shows it is the program's business."""

from __future__ import annotations

import ast
import logging
import subprocess
import sys
from contextlib import suppress
from io import StringIO
from pathlib import Path
from shutil import copytree

import pytest
from conftest import ROOT
from tqdm import tqdm

from lejepa_scale import logs
from lejepa_scale.config import Data
from lejepa_scale.data import evaluation_batches, open_mixture
from lejepa_scale.data.images.decode import DecodeError
from lejepa_scale.errors import UserError
from lejepa_scale.progress import counter

PACKAGE = logging.getLogger("lejepa_scale")
FILES = sorted((ROOT / "lejepa_scale").rglob("*.py"))


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Of a process that is no rank."""
    monkeypatch.delenv("RANK", raising=False)
    return monkeypatch


def test_lines_are_shown_once_and_other_loggers_stay(shown: None, capsys: pytest.CaptureFixture[str]) -> None:
    root, other = logging.getLogger(), logging.getLogger("another_library")
    before = root.handlers[:], root.level, other.handlers[:], other.level
    logs.to_stderr()
    logs.to_stderr()
    logging.getLogger("lejepa_scale.data.anything").info("%d shards", 3)
    logging.getLogger("lejepa_scale.data.anything").debug("a detail")
    other.info("not ours")
    assert (root.handlers, root.level, other.handlers, other.level) == before
    out = capsys.readouterr()
    assert (out.out, out.err.strip("\r")) == ("", "3 shards\n")


def test_a_library_says_errors_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Also where it sets its own level in the meantime, as torch does."""
    other = logging.getLogger("another_library.module")
    with logs.errors_alone(other.name):
        other.setLevel(logging.INFO)
        other.warning("told to nobody")
        other.error("told")
    other.warning("told again")
    assert caplog.messages == ["told", "told again"]


def test_ranks_beyond_the_first_show_warnings_alone(
    shown: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown.setenv("RANK", "1")
    logs.to_stderr()
    PACKAGE.info("what every rank does")
    PACKAGE.warning("what this rank met")
    assert capsys.readouterr().err.strip("\r") == "what this rank met\n"


def test_a_progress_bar_is_not_torn(shown: None, capsys: pytest.CaptureFixture[str]) -> None:
    logs.to_stderr()
    with tqdm(total=4, desc="indexing", file=sys.stderr, ncols=60, mininterval=0) as bar:
        bar.update()
        PACKAGE.warning("a line between two updates")
        bar.update()
    lines = [line.rpartition("\r")[2] for line in capsys.readouterr().err.split("\n")]
    assert lines[0] == "a line between two updates"
    assert lines[1].startswith("indexing:  50%")


@pytest.mark.parametrize(("terminal", "states"), [(True, 5), (False, 1)])
def test_a_log_gets_fewer_states_of_a_bar_than_a_terminal(
    terminal: bool, states: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, now = StringIO(), 0.0
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    monkeypatch.setattr("tqdm.std.TMonitor", lambda *_: None)  # a thread that would draw late states
    with counter("indexing", unit="shard", total=9) as progress:
        for _ in range(5):
            now += 4
            progress.update()
        shown = stream.getvalue().count("indexing:")
    assert shown == states, stream.getvalue()
    stream.truncate(0)
    with counter("indexing", unit="shard", total=9) as progress:
        now += 0.9
        progress.update(9)
    assert not stream.getvalue()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT / "lejepa_scale")))
def test_bars_are_drawn_in_one_way(path: Path) -> None:
    if path.name not in ("progress.py", "logs.py"):
        assert "tqdm" not in path.read_text()


def test_a_run_keeps_its_messages_and_what_ended_it(tmp_path: Path, shown: None) -> None:
    logs.to_stderr()
    with logs.kept(tmp_path):
        PACKAGE.info("before there is a run")
        assert not list(tmp_path.iterdir())
        (tmp_path / "config.yaml").touch()
        PACKAGE.warning("key=s3cret at http://user:word@host/a.tar")
    PACKAGE.warning("after it")
    with pytest.raises(UserError), logs.kept(tmp_path):
        raise UserError("a shard is lost.")
    with pytest.raises(ZeroDivisionError), logs.kept(tmp_path):
        1 / 0  # noqa: B018
    text = (tmp_path / "train.log").read_text()
    assert "INFO before there is a run" in text
    assert "word@" not in text
    assert "after it" not in text
    assert "ERROR a shard is lost." in text
    assert "ended by ZeroDivisionError" in text
    assert "1 / 0" in text
    assert all(line[:2] == "20" for line in text.splitlines()[:3])  # a time


def _fail(run: Path, error: UserError) -> None:
    with suppress(UserError), logs.kept(run):
        PACKAGE.warning("what this rank met")
        raise error


def test_a_refused_start_leaves_no_log(tmp_path: Path, shown: None) -> None:
    _fail(tmp_path / "run", UserError("refused."))
    assert not list(tmp_path.iterdir())


def test_other_ranks_have_a_log_where_they_have_something_to_say(tmp_path: Path, shown: pytest.MonkeyPatch) -> None:
    shown.setenv("RANK", "3")
    (tmp_path / "config.yaml").touch()
    everywhere = UserError("the same on every rank.")
    everywhere.everywhere = True
    _fail(tmp_path, everywhere)
    (found,) = tmp_path.glob("*.log")
    assert found.name == "train_rank3.log"
    assert len(found.read_text().splitlines()) == 1


def test_importing_configures_nothing() -> None:
    code = (
        "import logging, lejepa_scale.data, lejepa_scale.logs\n"
        "loggers = [logging.root, *(l for n, l in logging.root.manager.loggerDict.items() if n.startswith('lejepa'))]\n"
        "assert len(loggers) > 2, loggers\n"
        "assert not [l.handlers for l in loggers if getattr(l, 'handlers', None)], loggers\n"
        "assert not [l for l in loggers[1:] if getattr(l, 'level', 0)], loggers\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_a_first_start_says_that_it_indexes(
    scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = str(copytree(scenes, tmp_path / "scenes"))
    for index in Path(shards).glob("*.index.npz"):
        index.unlink()
    caplog.set_level(logging.INFO, "lejepa_scale")
    open_mixture(Data.model_validate({"shards": shards}))
    assert [record.name for record in caplog.records] == ["lejepa_scale.data.index.shards"]
    assert caplog.records[0].levelno == logging.INFO
    assert "3 of 3 shards have no index that fits them" in caplog.text
    assert "no index" not in capsys.readouterr().err
    caplog.clear()
    open_mixture(Data.model_validate({"shards": shards}))
    assert not caplog.records


def test_a_damaged_manifest_is_a_warning(scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = copytree(scenes, tmp_path / "scenes")
    data = Data.model_validate({"shards": str(shards)})
    open_mixture(data)
    caplog.clear()
    manifest = shards / "manifest.index.npz"
    manifest.write_bytes(manifest.read_bytes()[:40])
    open_mixture(data)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"the manifest of {shards} is damaged" in caplog.text


def test_missing_labels_and_images_are_warnings(
    scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lejepa_scale.data import evaluation
    from lejepa_scale.data.make import sources
    from lejepa_scale.data.make.writer import write_shards

    source = sources.scenes(4, 32, 0, "png", 90)
    unlabelled = [type(sample)(sample.key, sample.extension, sample.image) for sample in source.samples]
    write_shards(unlabelled, tmp_path / "bare", per_shard=4, total=4, classes=(), description={})
    open_mixture(Data.model_validate({"shards": [{"shards": str(scenes)}, {"shards": str(tmp_path / "bare")}]}))
    assert caplog.records[-1].getMessage() == "4 of 100 samples have no label: the online probe is off."
    assert caplog.records[-1].levelname == "WARNING"

    def refuse(data: bytes, pixels: object) -> None:
        raise DecodeError("nothing to see")

    monkeypatch.setattr(evaluation, "decode", refuse)
    caplog.clear()
    with pytest.raises(UserError, match=r"4 images in a row of shard .* cannot be used; .* nothing to see\."):
        list(evaluation_batches(str(tmp_path / "bare"), image_size=32, batch_size=4))
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 4
    assert caplog.records[0].getMessage().startswith("left out: ")
    assert caplog.records[0].getMessage().endswith("nothing to see")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_library_prints_nothing(path: Path) -> None:
    """Commands print (cli/), and a module that is run as a program; everything else logs."""
    if path.is_relative_to(ROOT / "lejepa_scale" / "cli"):
        return
    tree = ast.parse(path.read_text())
    tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and "__main__" in ast.unparse(n.test))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("print", "sys.stderr.write", "sys.stdout.write"), f"{path}:{node.lineno} prints"
            assert called not in ("logging.basicConfig", "logging.info", "logging.warning"), f"{path}:{node.lineno}"
