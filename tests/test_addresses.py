"""Secrets of addresses: used where they are sent, and nowhere to be found afterwards."""

from __future__ import annotations

import base64
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Command, small_config
from shardserver import Server, serve

from lejepa_scale import logs
from lejepa_scale.addresses import HIDDEN, Address, redacted
from lejepa_scale.config import Data, dump, validate
from lejepa_scale.data import open_mixture
from lejepa_scale.data.index.shards import index_shards
from lejepa_scale.data.io.reader import Reader, expand
from lejepa_scale.data.io.transport import Transport
from lejepa_scale.errors import UserError

SHOWN = {
    "http://h/a.tar?file=a.tar&page=2": "http://h/a.tar?file=a.tar&page=2",
    "http://me:pa55@h:80/a.tar": "http://***@h:80/a.tar",
    "http://me:pa@55@h/a@b.tar": "http://***@h/a@b.tar",
    "https://ghp_abc@h/a.tar": "https://***@h/a.tar",
    "http://me:pa55@[::1]:80/{a,b}.tar": "http://***@[::1]:80/{a,b}.tar",
    "https://b.s3.amazonaws.com/a.tar?X-Amz-Date=20260101T000000Z&X-Amz-Credential=AK%2F1&X-Amz-Signature=ab1": (
        "https://b.s3.amazonaws.com/a.tar?X-Amz-Date=20260101T000000Z&X-Amz-Credential=***&X-Amz-Signature=***"
    ),
    "https://s/a.tar?X-Amz-Security-Token=t/t+t==&x=1": "https://s/a.tar?X-Amz-Security-Token=***&x=1",
    "https://s/a.tar?AWSAccessKeyId=AK&Expires=1&Signature=a%2B": "https://s/a.tar?AWSAccessKeyId=***&Expires=1&Signature=***",
    "https://s/a.tar?GoogleAccessId=me&X-Goog-Signature=1": "https://s/a.tar?GoogleAccessId=***&X-Goog-Signature=***",
    "https://s/a.tar?sv=2020&se=2026-01-01&sig=a%3D": "https://s/a.tar?sv=2020&se=2026-01-01&sig=***",
    "https://s/a.tar?Policy=p&Key-Pair-Id=K&Signature=s": "https://s/a.tar?Policy=***&Key-Pair-Id=***&Signature=***",
    "https://s/a.tar?access_token=t&api_key=k&key=x&apikey=y#f": "https://s/a.tar?access_token=***&api_key=***&key=***&apikey=***",
    "pipe:curl -s -u me:pa55 'https://h/a.tar'": "pipe:curl -s -u *** 'https://h/a.tar'",
    "pipe:curl --user 'me:p a' -H 'Authorization: Bearer ey.J' h": "pipe:curl --user *** -H 'Authorization: ***' h",
    'pipe:curl -H "PRIVATE-TOKEN: glpat" -H "X-Api-Key:k" h': 'pipe:curl -H "PRIVATE-TOKEN: ***" -H "X-Api-Key:***" h',
    "pipe:AWS_SECRET_ACCESS_KEY=se/cret HF_TOKEN='t t' aws s3 cp s3://b/a.tar -": (
        "pipe:AWS_SECRET_ACCESS_KEY=*** HF_TOKEN=*** aws s3 cp s3://b/a.tar -"
    ),
    "pipe:get --password=p --token t --api-key 'k k' --limit 3 a": (
        "pipe:get --password=*** --token *** --api-key *** --limit 3 a"
    ),
    "photos/a@b?token=1.tar": "photos/a@b?token=1.tar",  # a path
    "pipe:cat a.tar | tee key=1": "pipe:cat a.tar | tee key=1",
}
AS_THEY_ARE = (
    "163,400 tokens/s, tokens=5; data.label_key=cls, image_key=left.jpg; write to me@h.org; keys: a, b",
    "cannot read shard http://h/a.tar: HTTP status 403. Check the address and your credentials: they ended.",
    "the authors: https://h/@me",
)


@pytest.mark.parametrize(("raw", "shown"), SHOWN.items())
def test_what_is_shown_of_an_address(raw: str, shown: str) -> None:
    address = Address(raw)
    assert [str(address), f"{address}", f"{address:s}", "%s" % address, repr(address)] == [*[shown] * 4, repr(shown)]  # noqa: UP031
    assert str(Address(shown)) == shown
    assert address == raw
    assert [*address] == [*raw]
    assert hash(address) == hash(raw)
    again = pickle.loads(pickle.dumps(address))
    assert (type(again), again, str(again)) == (Address, raw, shown)
    if not raw.startswith(("pipe:", "photos")):
        assert redacted(f"URLError: <{raw}>, {raw}") == f"URLError: <{shown}>, {shown}"
        assert str(UserError(f"shard {raw}: no.")) == f"shard {shown}: no."


@pytest.mark.parametrize("text", AS_THEY_ARE)
def test_what_is_no_secret_is_left_alone(text: str) -> None:
    assert redacted(text) == text
    assert redacted("HTTPPool(host='h'): Max retries exceeded with url: /a?sig=ab%3D (x)") == (
        "HTTPPool(host='h'): Max retries exceeded with url: /a?sig=*** (x)"
    )


def test_a_configuration_is_written_without_secrets(tmp_path: Path) -> None:
    raw = "http://me:pa55@h/a.tar?sig=abc"
    config = validate(small_config(tmp_path, raw))
    (address,) = config.data.shards[0].shards
    assert address == raw
    assert "http://***@h/a.tar?sig=***" in dump(config)
    for text in (dump(config), repr(config), str(config), config.model_dump_json(), str(config.model_dump())):
        assert "pa55" not in text
        assert "abc" not in text
    with pytest.raises(UserError, match=r"\*\*\* stands for a user, password or signature, which is written nowhere"):
        expand(["http://***@h/a.tar?sig=***"])


def test_messages_of_the_library_are_shown_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    package = logging.getLogger("lejepa_scale")
    before = package.handlers[:], package.level
    try:
        logs.to_stderr()
        logging.getLogger("lejepa_scale.data").warning("with url: %s", "/a.tar?X-Amz-Signature=abc")
    finally:
        package.handlers, package.level = before
    assert capsys.readouterr().err == "with url: /a.tar?X-Amz-Signature=***\n"


# -- used, or refused


def test_a_user_in_an_address_is_sent_to_that_host_alone(caplog: pytest.LogCaptureFixture) -> None:
    with serve() as server, serve() as other:
        server.expects = "Basic " + base64.b64encode("me:pa:5%5/ü".encode("latin1")).decode()
        server.files["a"] = other.files["b?sig=abc"] = b"bytes"
        server.moved["moved"] = other.url("b?sig=abc")
        host = server.address.removeprefix("http://")
        by = Transport(5, 0, 0.01)

        def read(name: str, user: str = "me:pa:5%255%2F%FC@") -> bytes:
            return b"".join(by.chunks(f"http://{user}{host}/{name}", 0, None, None))

        assert read("a") == b"bytes"
        with caplog.at_level(logging.DEBUG):
            assert [read("moved"), read("moved")] == [b"bytes", b"bytes"]
        assert other.authorizations == [None, None]
        assert "/b?sig=***" in caplog.text  # urllib3's own message
        assert "abc" not in caplog.text
        told = [r.getMessage() for r in caplog.records if r.name.startswith("lejepa_scale")]
        there = other.address.removeprefix("http://")
        assert told == [f"{host} sends requests on to {there}, which the bytes of its shards come from."]
        for user in ("", "me:wrong@", "me@"):
            with pytest.raises(UserError, match=r"HTTP status 401\. Check the address and your credentials") as caught:
                list(Reader(retries=0).stream(Address(f"http://{user}{host}/a")))
            assert "wrong" not in str(caught.value)
        assert server.authorizations[-1] == "Basic " + base64.b64encode(b"me:").decode()


def test_a_user_of_the_proxy_is_sent_to_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://me:pa55@127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    pool = Transport(5, 0, 0.01)._pool("http://somewhere/a.tar")
    assert pool.proxy.url == "http://127.0.0.1:9"
    assert pool.proxy_headers == {"proxy-authorization": "Basic " + base64.b64encode(b"me:pa55").decode()}


def test_a_user_for_an_object_store_is_refused_and_one_for_ftp_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    by = Transport(5, 0, 0.01)
    with pytest.raises(UserError, match=r"memory:// takes no user or password from an address\. ") as caught:
        by.filesystem(Address("memory://me:pa55@bucket/a.tar"))
    assert "pa55" not in str(caught.value)
    opened: list[dict[str, Any]] = []
    monkeypatch.setattr(fsspec, "filesystem", lambda scheme, **options: opened.append({"scheme": scheme, **options}))
    assert by.filesystem("ftp://me:pa55@h/d/a.tar")[1] == "/d/a.tar"
    by.filesystem("ftp://me:pa55@h/d/b.tar")
    by.filesystem("ftp://you:pa55@h/d/b.tar")
    assert [(x["scheme"], x["host"], x["username"], x["password"]) for x in opened] == [
        ("ftp", "h", "me", "pa55"),
        ("ftp", "h", "you", "pa55"),
    ]


def test_a_password_that_changed_changes_neither_index_nor_copy(scenes: Path, tmp_path: Path) -> None:
    with serve() as server:
        _serve(server, scenes)
        for user in ("", "me:one@", "me:two@"):
            address = server.address.replace("://", f"://{user}") + "/set/one.tar?X-Amz-Signature=s1gn"
            data = Data(shards=address, index_dir=tmp_path / "index", cache_dir=tmp_path / "cache")
            (tmp_path / "cache").mkdir(exist_ok=True)
            mixture = open_mixture(data)
            assert mixture.num_samples == 32
        assert len(list((tmp_path / "index").iterdir())) == 1
        assert sum(asked is None and "one.tar" in path and "npz" not in path for path, asked in server.requests) == 1


def _serve(server: Server, scenes: Path) -> None:
    server.files["set/one.tar?X-Amz-Signature=s1gn"] = min(scenes.glob("*.tar")).read_bytes()


# -- nowhere to be found


def test_a_run_writes_its_secrets_nowhere(
    scenes: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where it trains, nor where samples are faulty, nor where it fails, nor in W&B's files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    secrets = ("pa55word", "s1gn")
    run = tmp_path / "run"
    with serve() as server:
        _serve(server, scenes)
        tar = bytearray(server.files["set/one.tar?X-Amz-Signature=s1gn"])
        server.expects = "Basic " + base64.b64encode(b"me:pa55word").decode()
        address = server.address.replace("://", "://me:pa55word@") + "/set/one.tar?X-Amz-Signature=s1gn"
        tree = small_config(run, "unset", train={"steps": 3}, log={"wandb": {"enabled": True}})
        script = (ROOT / "launchers/train.py", "--config", command.config(tree), f"data.shards={address}")
        texts = []
        done = command(*script)
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout + done.stderr)
        (index,) = index_shards([str(min(scenes.glob("*.tar")))])
        for offset in index.offsets[::4]:  # damaged images: faults, in quarantine.jsonl
            tar[offset : offset + 4] = b"none"
        server.files["set/one.tar?X-Amz-Signature=s1gn"] = bytes(tar)
        done = command(*script, "train.steps=7")
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout + done.stderr)
        fault = json.loads((run / "quarantine.jsonl").read_text().splitlines()[0])
        assert (
            fault["shard"] == server.address.replace("://", f"://{HIDDEN}@") + f"/set/one.tar?X-Amz-Signature={HIDDEN}"
        )
        server.always = "404"
        done = command(*script, "train.steps=20", "data.retries=0")
        assert done.returncode == 2
        assert "HTTP status 404" in done.stderr
        texts.append(done.stdout + done.stderr)
        again = command(ROOT / "launchers/train.py", "--config", run / "config.yaml", f"run.dir={tmp_path / 'again'}")
        assert "stands for a user, password or signature" in again.stderr
    files = [path for path in (*run.rglob("*"), *(tmp_path / "user").rglob("*")) if path.is_file()]
    assert any("wandb-metadata" in path.name or path.suffix == ".wandb" for path in files)
    held = {str(path.relative_to(tmp_path)): path.read_bytes() for path in files}
    for secret in (*secrets, base64.b64encode(b"me:pa55word").decode()):
        assert not [name for name, data in held.items() if secret.encode() in data]
        assert not [text for text in texts if secret in text]
    assert "/set/one.tar" in (run / "config.yaml").read_text()
