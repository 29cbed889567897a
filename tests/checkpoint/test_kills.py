"""A run that is killed at any moment goes on as if nothing had been: no loss, weight or moment differs by a bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from benchmarks.ports import free_port
from conftest import small_config
from processes import eventually
from ranks import PRELOADED, as_rank
from safetensors.torch import load_file

from lejepa_scale.checkpoint import Store, files
from lejepa_scale.checkpoint.saved import marked, verify
from lejepa_scale.config import validate

WORLD, STEPS, EVERY = 2, 24, 3
EXACT = ("step", "loss", "loss_prediction", "loss_sigreg", "grad_norm", "lr", "effective_rank")


def _train(tree: dict[str, Any], environment: dict[str, str], step: int | None, within: int | None) -> None:
    """Train; die of SIGKILL at the end of that step of this start or, given `within`, in the fsync of that number
    after it."""
    import torch

    from lejepa_scale.training import actions, loop

    multiprocessing.set_start_method("fork", force=True)
    os.environ |= environment
    torch.set_num_threads(1)
    taken, synced, fsync, report = 0, 0, os.fsync, actions.Report.__call__

    def slow(descriptor: int) -> None:
        nonlocal synced
        if step is not None and within is not None and taken >= step:
            synced += 1
            if synced == within:
                os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02)
        fsync(descriptor)

    def counted(self: Any, run: Any, result: Any) -> None:
        nonlocal taken
        report(self, run, result)
        taken += 1
        if taken == step and within is None:
            os.kill(os.getpid(), signal.SIGKILL)

    files.os.fsync = slow  # type: ignore[assignment]
    actions.Report.__call__ = counted  # type: ignore[method-assign]
    loop.train(validate(tree))


def _start(tree: dict[str, Any], step: int | None = None, within: int | None = None, victim: int = 0) -> bool:
    """Train on real ranks until the end, or until one is killed, and then the others. Whether the run has come to its
    end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = str(free_port())
    ranks = [
        context.Process(
            target=_train, args=(tree, as_rank(rank, WORLD, port), step if rank == victim else None, within)
        )
        for rank in range(WORLD)
    ]
    for process in ranks:
        process.start()
    ranks[victim].join(200)
    if ranks[victim].exitcode != 0:
        assert ranks[victim].exitcode == -signal.SIGKILL
        for process in ranks:
            process.kill()
    for process in ranks:
        process.join(60)
    return ranks[victim].exitcode == 0


def _kills(tree: dict[str, Any], folder: Path, kills: int) -> None:
    whole = {**tree, "run": {"dir": str(folder / "whole")}}
    assert _start(whole)
    shared_memory = set(os.listdir("/dev/shm"))
    rng, run = random.Random(7), folder / "killed"
    tree = {**tree, "run": {"dir": str(run)}}
    store = Store(run, keep=2)
    for number in range(kills):
        inside = number % 2 == 0
        over = _start(tree, rng.randint(2, EVERY + 1), rng.randint(1, 7) if inside else None, rng.randrange(WORLD))
        assert not over or store.latest() is not None
        for path in store.complete():
            verify(path)
        if over:  # it has come to its end before it could be killed: again, from a checkpoint before
            latest = store.latest()
            assert latest is not None
            (latest / "COMPLETE").unlink()
    assert _start(tree)
    records = [
        [json.loads(line) for line in (x / "metrics.jsonl").read_text().splitlines()] for x in (folder / "whole", run)
    ]
    assert [[r[k] for k in EXACT] for r in records[1]] == [[r[k] for k in EXACT] for r in records[0]]
    last = [x / f"checkpoints/step_{STEPS:08d}" for x in (folder / "whole", run)]
    for path in last[0].glob("*.safetensors"):
        one, two = load_file(path), load_file(last[1] / path.name)
        assert one.keys() == two.keys()
        assert all(tensor.equal(two[key]) for key, tensor in one.items()), path.name
    assert sorted(p.name for p in store.root.iterdir()) == [f"step_{STEPS - EVERY:08d}", f"step_{STEPS:08d}"]
    assert all(marked(path) for path in store.root.iterdir())
    assert eventually(lambda: set(os.listdir("/dev/shm")) <= shared_memory, 10)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("engine", "kills"),
    [("fsdp", 2), pytest.param("fsdp", 15, marks=pytest.mark.slow), pytest.param("zero3", 15, marks=pytest.mark.slow)],
)
def test_a_killed_run_goes_on_bit_for_bit(scenes: Path, tmp_path: Path, engine: str, kills: int) -> None:
    """Half of the kills inside a save, of either rank."""
    tree = small_config(
        "unused",
        scenes,
        train={"steps": STEPS, "global_batch": 16},
        engine={"name": engine},
        checkpoint={"every": EVERY},
    )
    tree["model"]["drop_path"] = 0.2
    _kills(tree, tmp_path, kills)
