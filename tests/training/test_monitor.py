"""What ranks tell of their steps: medians and maxima by hand, hosts that others wait for, and real runs of two ranks."""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_config
from ranks import run_ranks

from lejepa_scale.config import validate
from lejepa_scale.data.loader import Loader
from lejepa_scale.parallel import process_group
from lejepa_scale.parallel.threads import cores
from lejepa_scale.training import loop, monitor
from lejepa_scale.training.monitor import PARTS, Monitor, Phases, RankTimes, stragglers, summarized

CPU = torch.device("cpu")
NOTHING = dict.fromkeys(PARTS, 0.0)


def phases() -> Phases:
    return Phases(lambda name, *, unlimited: nullcontext())


def of(rank: int, host: str, others: float, data: float = 0.0, step: float = 1.0) -> RankTimes:
    return RankTimes(rank, host, {**NOTHING, "other ranks": others, "data wait": data}, step, 0.0, 1.0)


def rows(*times: RankTimes) -> torch.Tensor:
    return torch.tensor([[*one.parts.values(), one.step, one.memory, one.host_memory] for one in times])


def test_parts_are_added_up_until_they_are_taken() -> None:
    told: list[tuple[str, bool]] = []
    timed = Phases(lambda name, *, unlimited: told.append((name, unlimited)) or nullcontext())  # type: ignore[func-returns-value]
    for _ in range(2):
        with timed("forward"):
            time.sleep(0.02)
    with timed("saving", unlimited=True):
        pass
    assert told == [("forward", False)] * 2 + [("saving", True)]
    taken = timed.take()
    assert taken["forward"] == pytest.approx(0.04, abs=0.02)
    assert timed.take() == {}


def test_a_record_has_medians_and_maxima() -> None:
    rows = torch.arange(3 * (len(PARTS) + 3), dtype=torch.float64).view(3, -1) + 1
    found = summarized(rows, cuda=True)
    for i, name in enumerate(monitor._MEASURED):
        column = rows[:, i].tolist()
        assert found[name] == statistics.median(column)
        assert found[f"{name}_max"] == max(column)
    waits = [wait / step for wait, step in zip(rows[:, 0].tolist(), rows[:, len(PARTS)].tolist(), strict=True)]
    assert found["data_wait_fraction"] == pytest.approx(statistics.median(waits))
    assert found["data_wait_fraction_max"] == pytest.approx(max(waits))
    alone = summarized(rows[:1], cuda=False)
    assert not any(name.endswith("_max") or name == "memory_gib" for name in alone)


def test_hosts_that_others_wait_for() -> None:
    """Four hosts of two; ranks 4 and 5 wait for nobody, since their images come late."""
    times = [of(rank, "abcd"[rank // 2], 0.3) for rank in range(8)]
    assert stragglers(times) == []
    times[4], times[5] = of(4, "c", 0.0, data=0.35), of(5, "c", 0.01, data=0.34)
    (found,) = stragglers(times)
    assert (found.host, found.ranks) == ("c", [4, 5])
    assert found.seconds == pytest.approx(0.3)
    assert "wait 0.3 s of a step of 1 s for c (ranks 4, 5), which waits 0.35 s for images" in str(found)
    assert stragglers([replace(one, step=10.0) for one in times]) == []  # 3 % of a step are nobody's fault
    assert stragglers(times[:1]) == []


@pytest.mark.parametrize("seed", range(20))
def test_the_quick_look_finds_what_the_long_one_finds(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = 2 + seed % 7
    waits = torch.rand(count, generator=generator) * (0.05 if seed % 3 else 1.0)
    times = [of(rank, f"h{rank // 2}", float(wait)) for rank, wait in enumerate(waits)]
    late = {rank for one in stragglers(times) for rank in one.ranks}
    found = {int(rank) for rank in monitor._late(rows(*times)).nonzero()}
    assert found == late


def test_two_hosts_have_a_slower_one() -> None:
    """Half of all ranks wait: their median says nothing, their mean does."""
    (found,) = stragglers([of(0, "a", 0.4), of(1, "a", 0.4), of(2, "b", 0.0), of(3, "b", 0.0)])
    assert found.host == "b"
    assert found.ranks == [2, 3]


def test_a_slow_host_is_told_of_once_in_a_while(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, slow = Monitor(tmp_path, phases(), CPU), rows(of(0, "a", 0.4), of(1, "b", 0.0, data=0.4))
    watch._hosts = ["a", "b"]
    clock = [1000.0]
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: clock[0])
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        watch._tell(slow)
    watch._tell(rows(of(0, "a", 0.0), of(1, "b", 0.0)))  # it was passing
    for _ in range(2):
        watch._tell(slow)
    assert caplog.messages == []
    for _ in range(5):
        watch._tell(slow)
    assert len(caplog.messages) == 1
    assert "for b (rank 1), which waits 0.4 s for images" in caplog.messages[0]
    clock[0] += 1900
    watch._tell(slow)
    assert len(caplog.messages) == 2


def _late_images(folder: str, shards: str) -> None:
    """Rank 1's loader takes 50 ms longer for each batch."""
    process_group.leave()
    usual = Loader.__iter__

    def slow(self: Loader) -> Any:
        for batch in usual(self):
            time.sleep(0.05 * self.rank)
            yield batch

    Loader.__iter__ = slow  # type: ignore[method-assign]
    loop.train(validate(small_config(folder, shards, train={"steps": 12}, engine={"name": "ddp"}, log={"every": 4})))


def test_a_run_tells_of_all_ranks(scenes: Path, tmp_path: Path) -> None:
    run_ranks(_late_images, 2, str(tmp_path), str(scenes))
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["seconds_data_wait_max"] > 0.04
    assert record["seconds_data_wait_max"] > record["seconds_data_wait"] > 0
    assert record["data_wait_fraction_max"] > record["data_wait_fraction"]
    assert record["seconds_forward"] > 0
    assert record["host_memory_gib_max"] >= record["host_memory_gib"] > 0.1
    assert record["step_seconds"] == pytest.approx(16 / record["images_per_second"], rel=0.2)
    found = monitor.read_ranks(tmp_path)
    assert found is not None
    _, written, times = found
    assert abs(time.time() - written) < 600
    assert [one.rank for one in times] == [0, 1]
    assert times[1].parts["data wait"] > 0.04
    assert times[0].parts["other ranks"] > times[1].parts["other ranks"]


def test_what_is_torn_is_nothing(tmp_path: Path) -> None:
    assert monitor.read_ranks(tmp_path) is None
    (tmp_path / monitor.FILE).write_text('{"step": 1')
    assert monitor.read_ranks(tmp_path) is None


@pytest.mark.parametrize(("resource", "most"), [(True, 100.0), (False, 0.0)])
def test_memory_where_there_is_no_proc(resource: bool, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS says the largest; Windows, without `resource`, nothing."""
    assert monitor._host_memory() > 0.05

    def absent(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(monitor.Path, "read_text", absent)
    if not resource:
        monkeypatch.setitem(sys.modules, "resource", None)
    found = monitor._host_memory()
    assert found <= most
    assert (found > 0.05) == resource


def test_cores_where_the_system_does_not_say_which(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS, Windows
    assert cores() == os.cpu_count()
