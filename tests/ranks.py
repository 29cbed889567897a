"""Run a plain function on several gloo ranks, for real, and give back what each returned."""

from __future__ import annotations

import gc
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from benchmarks.ports import free_port

# By what ranks and programs are forked from: it has run nothing. DeepSpeed's engines import the compiler, 2 s, and collect
# garbage a dozen times at a start, 0.3 s each with all of torch to look through: see `gc.freeze`.
PRELOADED = [
    "lejepa_scale.training.loop",
    "torch._dynamo",
    *(["deepspeed", "deepspeed.runtime.zero.muon.original_muon"] if find_spec("deepspeed") else []),
]


def as_rank(rank: int, world: int, port: str) -> dict[str, str]:
    """What a launcher puts into the environment of a rank, all on this machine."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    return {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def run_ranks(function: Callable[..., Any], world: int, *args: Any, timeout: float = 240) -> list[Any]:
    """`function(*args)` on `world` processes inside a process group; results by rank. Fails if any rank fails or hangs."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        processes = [
            context.Process(target=_rank, args=(function, rank, world, port, folder, args), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        stuck = [i for i, p in enumerate(processes) if p.is_alive()]
        for process in processes:
            process.kill()
        errors = [p.read_text() for p in sorted(Path(folder).glob("error*"))]
        assert not errors, errors[0]
        assert not stuck, f"ranks {stuck} did not finish in {timeout} s"
        return [torch.load(Path(folder) / f"result{rank}", weights_only=False) for rank in range(world)]


def _rank(function: Callable[..., Any], rank: int, world: int, port: int, folder: str, args: tuple[Any, ...]) -> None:
    gc.freeze()
    os.environ |= as_rank(rank, world, str(port))
    torch.set_num_threads(1)
    from lejepa_scale.parallel import collectives, process_group

    try:
        process_group.join(timedelta(seconds=120))
        torch.save(function(*args), Path(folder) / f"result{rank}")
        collectives.barrier()
        process_group.leave()
    except BaseException:
        (Path(folder) / f"error{rank}").write_text(traceback.format_exc())
        os._exit(1)
