"""Weights & Biases: whatever its service does, a training goes on, and its numbers are somewhere."""

from __future__ import annotations

import json
import logging
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import small_config

from lejepa_scale.config import Config, validate
from lejepa_scale.training import wandb_run
from lejepa_scale.training.reporting import Reporter

wandb = pytest.importorskip("wandb")
KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def server() -> Iterator[Any]:
    """One that answers what `answer` says: a status and a document; `asked` are the requests' headers."""
    state: Any = SimpleNamespace(answer=(200, {}), asked=[], wait=threading.Event())
    state.wait.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            state.asked.append((self.path, dict(self.headers)))
            self.rfile.read(int(self.headers["Content-Length"]))
            state.wait.wait(5)
            status, document = state.answer
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(document).encode())

        def log_message(self, *_: Any) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{listening.server_port}"
    yield state
    state.wait.set()
    listening.shutdown()
    listening.server_close()


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_RUN_ID", "WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_a_server_that_knows_the_key_is_used(server: Any) -> None:
    server.answer = (200, {"data": {"viewer": {"id": "x"}}})
    assert wandb_run._mode(KEY, server.url, "runs/a") == "online"
    server.asked.clear()
    assert wandb_run._mode(KEY, server.url, "runs/a") == "online"
    ((path, headers),) = server.asked
    assert path == "/graphql"
    assert headers["Authorization"].startswith("Basic ")
    assert KEY not in headers["Authorization"]  # encoded, as the library does
    server.answer = (200, {"data": {"viewer": None}})
    assert wandb_run._mode("", server.url, "runs/a") == "online"  # a key that only the library has, which was not sent


def test_a_mode_that_the_user_has_chosen_asks_no_server(
    server: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "shared")
    assert wandb_run._mode(None, server.url, "runs/a") == "shared"
    assert wandb_run._mode(KEY, server.url, "runs/a") == "shared"
    assert not server.asked
    assert not caplog.text


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ((200, {"data": {"viewer": None}}), "does not know the key"),
        ((200, ["nonsense"]), "does not know the key"),
        ((401, {}), "answers 401: it does not know the key"),
        ((502, {}), "answers 502"),
    ],
)
def test_a_server_that_would_take_nothing_is_told_of(
    server: Any, answer: Any, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.answer = answer
    assert wandb_run._mode(KEY, server.url, "runs/a") == "offline"
    assert told in caplog.text
    assert "`wandb sync runs/a/wandb/offline-run-*` sends it later" in caplog.text
    assert KEY not in caplog.text


def test_no_server_a_silent_one_and_no_key(
    server: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # nobody listens
        assert wandb_run._mode(KEY, f"http://127.0.0.1:{bound.getsockname()[1]}", "runs/a") == "offline"
    assert "does not answer" in caplog.text
    monkeypatch.setattr(wandb_run, "_ASK_SECONDS", 0.2)
    server.wait.clear()
    caplog.clear()
    assert wandb_run._mode(KEY, server.url, "runs/a") == "offline"
    assert "does not answer (timed out)" in caplog.text
    caplog.clear()
    assert wandb_run._mode(None, server.url, "runs/a") == "offline"
    assert "there is no key" in caplog.text


def test_the_key_is_that_of_the_environment_or_of_wandb_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keyless, other = SimpleNamespace(login=lambda **_: False), SimpleNamespace(login=lambda **_: True)
    assert wandb_run._key("https://a.example", keyless) is None
    assert wandb_run._key("https://a.example", other) == ""
    (tmp_path / ".netrc").write_text(f"machine a.example login user password {KEY}\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert wandb_run._key("https://a.example", keyless) == KEY
    assert wandb_run._key("https://b.example", keyless) is None
    monkeypatch.setenv("WANDB_API_KEY", "mine")
    assert wandb_run._key("https://a.example", keyless) == "mine"


def config_of(folder: Path) -> Config:
    (folder / "run").mkdir(exist_ok=True)
    return validate(small_config(folder / "run", "s", log={"wandb": {"enabled": True, "project": "ours"}}))


def begun(config: Config, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the library is started with."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(wandb, "init", lambda **words: asked.update(words) or "a run")
    assert wandb_run.start(config) == "a run"
    return asked


def test_the_environment_comes_first_and_a_run_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path)
    first = begun(config, monkeypatch)
    assert (first["project"], first["name"], first["mode"], first["resume"]) == ("ours", "run", "offline", "allow")
    assert first["settings"].finish_timeout == 60
    assert begun(config, monkeypatch)["id"] == first["id"] == (tmp_path / "run/wandb_id").read_text()
    for name, value in (("MODE", "disabled"), ("PROJECT", "theirs"), ("RUN_ID", "theirs"), ("RESUME", "must")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "5")
    theirs = begun(config, monkeypatch)
    assert not {"mode", "project", "id", "resume"} & theirs.keys()
    assert theirs["name"] == "run"
    assert "finish_timeout" not in theirs["settings"].model_fields_set


@pytest.mark.parametrize("fails", [False, True])
def test_the_library_sees_a_command_line_without_secrets(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, seen = ["lejepa", "train", "data.shards=https://me:secret@a.example/x.tar"], []
    monkeypatch.setattr(sys, "argv", words)

    def init(**_: Any) -> str:
        seen.extend(sys.argv)
        if fails:
            raise wandb.errors.CommError("no")
        return "a run"

    monkeypatch.setattr(wandb, "init", init)
    assert wandb_run.start(config_of(tmp_path)) == (None if fails else "a run")
    assert seen[:2] == words[:2]
    assert "a.example" in seen[2]
    assert "secret" not in seen[2]
    assert sys.argv is words


def test_a_library_that_fails_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(tmp_path)

    def fails(*_: Any, **__: Any) -> None:
        raise wandb.errors.CommError("Run initialization has timed out at https://me:secret@a.example/x")

    monkeypatch.setattr(wandb, "init", fails)
    reporter = Reporter(config, 0, active=True)
    assert "could not be started (Run initialization has timed out at https://" in caplog.text
    assert "secret" not in caplog.text
    reporter.log({"step": 1.0, "loss": 2.0})
    reporter.close()
    logged = []
    monkeypatch.setattr(
        wandb, "init", lambda **_: SimpleNamespace(log=lambda *a, **k: logged.append(a) or fails(), finish=fails)
    )
    reporter = Reporter(config, 1, active=True)
    for step in (2.0, 3.0):
        reporter.log({"step": step, "loss": 2.0})
    reporter.close()
    assert len(logged) == 1  # the second time it is not asked any more
    assert [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_an_offline_run_is_written_for_real(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By the library, with no key; the notice's advice names files that are there."""
    caplog.set_level(logging.WARNING)
    reporter = Reporter(config_of(tmp_path), 0, active=True)
    reporter.log({"step": 1.0, "loss": 2.0})
    reporter.close()
    assert list((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))
    assert "there is no key" in caplog.text
