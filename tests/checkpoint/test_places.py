"""Checkpoints in object stores: in memory, and over the protocol of S3 on a server of this machine."""

from __future__ import annotations

import json
import logging
import os
import signal
import uuid
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.ports import free_port
from conftest import mostly_slow, small_config
from ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import save_file
from saving import Holder, save, values
from steps import start, take_step
from upath import UPath

from lejepa_scale.checkpoint import Progress, Saved, Saver, Store, gather, load_encoder, places, sources
from lejepa_scale.checkpoint.files import Entry, write_safetensors, write_text
from lejepa_scale.checkpoint.layout import boxes, divided, key
from lejepa_scale.checkpoint.places import place
from lejepa_scale.checkpoint.saved import index_text, marked, state_text, verify
from lejepa_scale.checkpoint.saver import NotSaved
from lejepa_scale.checkpoint.store import find
from lejepa_scale.checkpoint.tensors import TensorFile
from lejepa_scale.cli.main import main
from lejepa_scale.config import validate
from lejepa_scale.engine.base import VALUE
from lejepa_scale.errors import Exit, UserError
from lejepa_scale.parallel import process_group
from lejepa_scale.training import lock, loop


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    """S3 by moto, of which nothing leaves this machine."""
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    port = free_port()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    running.start()
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        UPath("s3://bucket").fs.mkdir("bucket")
        yield settings
    running.stop()


@pytest.fixture(params=["memory", "s3"])
def root(request: pytest.FixtureRequest) -> UPath:
    """An empty folder of a store."""
    if request.param == "s3":
        request.getfixturevalue("server")
    return place(f"{request.param}://bucket/{uuid.uuid4().hex}")  # type: ignore[return-value]


def names(root: UPath) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_what_is_saved_is_loaded(root: UPath, tmp_path: Path) -> None:
    store = Store(tmp_path, keep=2, root=root)
    assert store.latest() is None
    path = save(store, 5)
    assert str(path) == f"{root}/step_00000005"
    saved = Saved(path)
    assert saved.progress == Progress(5, "shards", updates=7)
    for kind, tensors in values(5.0).items():
        for name, tensor in tensors.items():
            assert torch.equal(saved.whole(name, kind), tensor)
    assert torch.equal(saved.whole("count"), torch.tensor(3))
    assert torch.equal(saved.read("a.weight", "exp_avg", 1, 4), torch.arange(1.0, 5) + 105)
    assert torch.equal(saved.probe()["head"], torch.ones(2))
    verify(path)
    assert find(root) == find(str(path)) == path
    assert (tmp_path / "last_checkpoint").read_text() == "step_00000005\n"
    local = save(Store(tmp_path, keep=2), 5)
    for file in ("model.safetensors", "optimizer.safetensors", "index.json"):
        assert (path / file).read_bytes() == (local / file).read_bytes()


def test_retention_and_damage(root: UPath, tmp_path: Path) -> None:
    store = Store(tmp_path, keep=1, keep_every=4, root=root)
    for step in range(1, 7):
        save(store, step)
    assert names(root) == ["step_00000004", "step_00000006"]
    damaged = root / "step_00000006"
    (damaged / "optimizer.safetensors").write_bytes(b"0" * (damaged / "optimizer.safetensors").stat().st_size)
    with pytest.raises(UserError, match=r"step_00000006/optimizer\.safetensors is corrupt"):
        verify(damaged)
    (damaged / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"step_00000006/model\.safetensors is missing"):
        verify(damaged)
    assert store.set_aside(damaged).name == "step_00000006.damaged"
    assert store.latest() == root / "step_00000004"
    assert names(root) == ["step_00000004", "step_00000006.damaged"]


def test_what_a_kill_has_left_is_not_there_and_goes(root: UPath, tmp_path: Path) -> None:
    store = Store(tmp_path, keep=3, root=root)
    save(store, 1)
    for file in ("model.safetensors", "state.json"):
        (root / "step_00000002" / file).write_bytes(b"half")
    (root / "best_step_00000009" / "COMPLETE").write_text("mine")
    assert marked(root / "step_00000002") is None
    assert store.latest() == root / "step_00000001"
    save(store, 3)
    assert names(root) == ["best_step_00000009", "step_00000001", "step_00000003"]
    save(store, 3)  # again
    verify(root / "step_00000003")


def test_a_store_that_fails_is_a_paragraph(root: UPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path, keep=3, root=root)
    good = save(store, 1)

    open_ = type(root.fs).open

    def refused(*_: Any, **__: Any) -> Any:
        raise RuntimeError("SlowDown: Please reduce your request rate.\nmore")

    def read_only(self: Any, path: str, mode: str = "rb", *arguments: Any, **options: Any) -> Any:
        return refused() if "w" in mode else open_(self, path, mode, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(root.fs), "open", read_only)
        with pytest.raises(
            NotSaved, match=r"step 2 is not saved: cannot write \w+://bucket/\w+/step_00000002: SlowDown"
        ):
            save(store, 2)
    assert names(root) == ["step_00000001"]
    with monkeypatch.context() as patch:
        patch.setattr(type(root.fs), "cat_file", refused)
        patch.setattr(type(root.fs), "open", refused)
        with pytest.raises(UserError, match=r"step_00000001/COMPLETE cannot be read: SlowDown"):
            store.latest()  # "there is none" would begin the run again
    verify(good)


def test_a_server_that_is_gone_is_not_an_empty_store(server: dict[str, str], tmp_path: Path) -> None:
    lost = UPath(
        "s3://bucket/run",
        endpoint_url=f"http://127.0.0.1:{free_port()}",
        config_kwargs={"retries": {"max_attempts": 0}},
    )
    with pytest.raises(UserError, match=r"s3://bucket/run\S* cannot be read") as caught:
        Store(tmp_path, keep=1, root=lost).latest()
    assert caught.value.status == Exit.FAULT


@pytest.mark.parametrize(
    ("credentials", "says"),
    [({}, "Unable to locate credentials"), ({"profile": "x"}, r"profile \(x\) could not be found")],
)
def test_credentials_that_are_lacking_are_the_users_to_mend(
    server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, credentials: dict[str, str], says: str
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    root = UPath("s3://bucket/run", anon=False, skip_instance_cache=True, **credentials)
    with pytest.raises(UserError, match=f"cannot be read: .*{says}") as caught:
        Store(tmp_path, keep=1, root=root).latest()
    assert caught.value.status == Exit.MISTAKE


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ("https://host/run", "https://host/run cannot hold checkpoints: name a folder, or a store"),
        ("nosuch://bucket/run", "nosuch://bucket/run cannot be used: Unsupported filesystem"),
    ],
)
def test_what_cannot_hold_checkpoints_is_refused(named: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        place(named)


def test_a_package_that_is_not_there_is_named() -> None:
    if any(__import__("importlib.util").util.find_spec(name) for name in ("gcsfs",)):
        pytest.skip("it is there")
    with pytest.raises(UserError, match=r"gs://bucket/run needs a package that is not here: .*gcsfs"):
        place("gs://bucket/run")


def test_rows_are_those_of_safetensors(root: UPath, tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(7, 5, 3), "b": torch.randn(9).bfloat16(), "c": torch.tensor(3), "d": torch.zeros(0, 4),
        "e": torch.arange(6, dtype=torch.uint8).view(2, 3) > 2,
    }  # fmt: skip
    save_file(tensors, tmp_path / "t.safetensors")
    (root / "t.safetensors").write_bytes((tmp_path / "t.safetensors").read_bytes())
    for path in (root / "t.safetensors", tmp_path / "t.safetensors"):
        ours = TensorFile(path)
        with safe_open(tmp_path / "t.safetensors", "pt") as theirs:
            assert sorted(ours.keys()) == sorted(theirs.keys())
            for name in tensors:
                assert torch.equal(ours.tensor(name), theirs.get_tensor(name))
                assert list(ours.shape(name)) == theirs.get_slice(name).get_shape()
            assert torch.equal(ours.elements("a", 15, 45).view(2, 5, 3), theirs.get_slice("a")[1:3])


def test_any_part_of_any_cut_is_read(root: UPath, tmp_path: Path) -> None:
    """Parts of other ranks than wrote them, in files of four ranks: as a file system gives them."""
    rng = np.random.default_rng(0)
    shape, cuts = (6, 5, 4), [0, 17, 60, 61, 120]
    whole = torch.randn(shape)
    for target in (root, tmp_path / "checkpoints"):
        folder = target / "step_00000001"
        if isinstance(folder, Path):
            folder.mkdir(parents=True)
        held = np.array([[[a, b - a]] for a, b in pairwise(cuts)])
        layout = divided({"w": shape}, held)
        files = {}
        for rank, (first, last) in enumerate(pairwise(cuts)):
            flat, at, out = whole.reshape(-1)[first:last], 0, []
            for box in boxes(shape, first, last - first):
                sides = tuple(side.stop - side.start for side in box)
                count = int(np.prod(sides))
                out.append(Entry.of(key("w", shape, box), sides, flat[at : at + count]))
                at += count
            name = f"model-{rank + 1:05d}-of-00004.safetensors"
            files[name] = write_safetensors(folder / name, out)
        files["index.json"] = write_text(folder / "index.json", index_text(layout, {}, [VALUE]))
        files["state.json"] = write_text(folder / "state.json", state_text(Progress(1, "x")))
        write_text(folder / "COMPLETE", json.dumps({n: {"bytes": w.bytes, "crc32": w.crc32} for n, w in files.items()}))
    remote, local = Saved(root / "step_00000001"), Saved(tmp_path / "checkpoints/step_00000001")
    for _ in range(40):
        first, last = sorted(rng.integers(0, 121, 2).tolist())
        assert torch.equal(remote.read("w", VALUE, first, last - first), local.read("w", VALUE, first, last - first))
        assert torch.equal(remote.read("w", VALUE, first, last - first), whole.reshape(-1)[first:last])


# -- one run, one place


def test_a_place_has_one_run(root: UPath, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(lock, "WATCH_SECONDS", 60.0)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)
    with lock.locked(root):
        assert names(root) == ["lock"]
        with pytest.raises(UserError, match=rf"{root} is in use by process {os.getpid()} on "), lock.locked(root):
            pass
        monkeypatch.setattr(lock.socket, "gethostname", lambda: "another")  # which sees no processes of ours
        with pytest.raises(UserError, match=rf"is in use by process {os.getpid()} on "), lock.locked(root):
            pass
    assert not (root / "lock").exists()
    dead = {"host": "gone", "pid": 5, "since": "2026-01-01", "begun": "1", "namespace": "x", "beat": 7}
    (root / "lock").write_text(json.dumps(dead))
    monkeypatch.setattr(lock, "WATCH_SECONDS", 1.0)
    with lock.locked(root):
        assert "was in use by process 5 on gone, since 2026-01-01, which is gone" in caplog.text
        assert json.loads((root / "lock").read_text())["pid"] == os.getpid()


# -- runs


def _config(folder: Path, scenes: Path, root: UPath, steps: int, **sections: Any) -> Any:
    checkpoint = {"every": 2, "keep": 2, "dir": str(root), **sections.pop("checkpoint", {})}
    return validate(
        small_config(folder, scenes, checkpoint=checkpoint, train={"steps": steps, "global_batch": 16}, **sections)
    )


def test_a_run_goes_on_from_a_store_without_its_directory(scenes: Path, tmp_path: Path, root: UPath) -> None:
    """As on a machine that was taken away and replaced."""
    flat = {"final_lr_ratio": 1.0}
    loop.train(_config(tmp_path / "a", scenes, root, 4, optim=flat))
    assert names(root) == ["step_00000002", "step_00000004"]
    assert not (tmp_path / "a/checkpoints").exists()
    loop.train(_config(tmp_path / "b", scenes, root, 6, optim=flat))
    loop.train(validate(small_config(tmp_path / "c", scenes, train={"steps": 6, "global_batch": 16}, optim=flat)))
    here, there = Saved(tmp_path / "c/checkpoints/step_00000006"), Saved(root / "step_00000006")
    for name in here.shapes:
        assert torch.equal(here.whole(name), there.whole(name)), name
    for found in (tmp_path / "b", str(root), f"{root}/step_00000006"):
        encoder, _ = load_encoder(found)
        assert torch.equal(encoder.backbone.norm.weight, here.whole("encoder.backbone.norm.weight"))  # type: ignore[union-attr, arg-type]
    assert main(["convert", str(root), str(tmp_path / "e.safetensors"), "--to", "safetensors", "--verify"]) == 0
    read = sources.read(str(root))
    assert torch.equal(read.sets[""]["encoder.backbone.norm.weight"], here.whole("encoder.backbone.norm.weight"))
    with pytest.raises(
        UserError, match=r"run\.resume=never, and \S+step_00000006 is there: give another checkpoint\.dir"
    ):
        loop.train(_config(tmp_path / "d", scenes, root, 6, run={"dir": str(tmp_path / "d"), "resume": "never"}))


def _on_ranks(settings: dict[str, str], name: str, root: str, folder: str, first: int) -> Any:
    os.environ |= settings  # the server that ranks are forked from may have begun before
    config = validate(
        small_config(
            "unused", "unused", engine={"name": name}, model={"options": {"depth": 2}}, train={"global_batch": 16}
        )
    )
    store = Store(Path(folder), keep=9, root=place(root))
    saved = Saved(store.root / f"step_{first:08d}") if first else None
    engine, plan = start(config, saved=saved)
    state = gather(engine)
    rank = process_group.rank()
    for step in range(first, first + 2):
        views = torch.randn(2, 16, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        take_step(engine, plan, [[views[:, rank * plan.micro_batch :][:, : plan.micro_batch]]], step)
    background = Saver(store, engine)
    background.begin(Progress(first + 2, "shards"), {}, "run: {}\n")
    background.finish()
    engine.close()
    return state


@pytest.mark.parametrize(("name", "world"), mostly_slow([("zero3", 2), ("fsdp", 4)], ("zero3", 2)))
def test_ranks_write_and_read_a_store_in_parts(server: dict[str, str], tmp_path: Path, name: str, world: int) -> None:
    root = place(f"s3://bucket/{uuid.uuid4().hex}")
    run_ranks(_on_ranks, 2, server, "fsdp", str(root), str(tmp_path), 0)
    written = Saved(root / "step_00000002")
    assert written.ranks == 2
    state = run_ranks(_on_ranks, world, server, name, str(root), str(tmp_path), 2)[0]
    for kind, tensors in {"value": state.model, **state.moments}.items():
        for tensor_name, tensor in tensors.items():
            assert torch.equal(written.whole(tensor_name, kind), tensor), (kind, tensor_name)


def _killed_while_writing(settings: dict[str, str], root: str, folder: str) -> None:
    os.environ |= settings
    store = Store(Path(folder), keep=9, root=place(root))
    save(store, 1)
    background = Saver(store, Holder(values(2.0)))
    background.begin(Progress(2, "shards"), {}, "run: {}\n")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_inside_a_save_leaves_the_one_before(server: dict[str, str], tmp_path: Path) -> None:
    root = place(f"s3://bucket/{uuid.uuid4().hex}")
    with pytest.raises(FileNotFoundError):  # no result: it was killed
        run_ranks(_killed_while_writing, 1, server, str(root), str(tmp_path))
    store = Store(tmp_path, keep=9, root=root)
    assert store.latest() == root / "step_00000001"
    verify(root / "step_00000001")
    assert places.listed(root / "nowhere") == {}
