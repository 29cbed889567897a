"""What ranks tell one another beside the step: a signal, a read that failed. On 2 and 4 gloo ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import small_config
from ranks import run_ranks

from lejepa_scale.checkpoint import Progress
from lejepa_scale.config import BatchPlan, validate
from lejepa_scale.data import Batch
from lejepa_scale.data.audit.keylog import Record
from lejepa_scale.data.faults import Fault
from lejepa_scale.errors import UserError
from lejepa_scale.parallel import collectives, process_group
from lejepa_scale.training import actions
from lejepa_scale.training.feed import Feed
from lejepa_scale.training.run import Run

pytestmark = pytest.mark.unchecked
CPU = torch.device("cpu")


def _sums(_: str) -> list[float]:
    """Two under way at once, with another collective between."""
    first = collectives.begin_sum(torch.tensor(float(process_group.rank() + 1)))
    second = collectives.begin_sum(torch.tensor(10.0))
    dist.barrier()
    return [float(second()), float(first())]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_sums_that_are_begun_come(ranks: int) -> None:
    assert run_ranks(_sums, ranks, "") == [[10.0 * ranks, ranks * (ranks + 1) / 2]] * ranks


def _steps_until_stopped(folder: str) -> list[int]:
    """The last rank is asked in its second step."""
    config = validate(small_config(folder, "s", train={"steps": 6}))
    plan = BatchPlan(micro_batch=8, ranks=process_group.world_size(), accumulation=1)
    run = Run(config, plan, CPU, SimpleNamespace(), SimpleNamespace(), Progress(0, "s"))  # type: ignore[arg-type]
    why = ""
    request: Any = SimpleNamespace(reason=lambda: why, met=lambda: None)
    stop, taken = actions.Stop(request), []
    for step in range(1, 7):
        run.progress.step = step
        taken.append(step)
        if step == 2 and process_group.rank() == process_group.world_size() - 1:
            why = "SIGUSR2"
        stop(run, SimpleNamespace())  # type: ignore[arg-type]
        if run.stopping:
            break
    return taken


@pytest.mark.parametrize(("ranks", "last"), [(1, 2), (2, 3), (4, 3)])
def test_a_signal_at_one_rank_stops_all_after_the_same_step(tmp_path: Path, ranks: int, last: int) -> None:
    assert run_ranks(_steps_until_stopped, ranks, str(tmp_path)) == [list(range(1, last + 1))] * ranks


def _batches(fails_at: int | None, events: list[str]) -> Iterator[Batch]:
    for number in range(100):
        if number == fails_at:
            raise UserError("a.tar cannot be read.")
        events.append(f"read {number}")
        faults = [Fault("a.tar", "x", 512, "no image")] if number == 1 and process_group.rank() == 0 else []
        yield Batch(
            [], [], torch.tensor([number]), [str(number)], faults, [Record(number, 0, 0, 0, number, f"a.tar/{number}")]
        )


def _fed(steps: int, fails_at: int | None) -> tuple[list[str], list[int], str]:
    """What is asked for and used, in order; how many were replaced at each step, and the error at the end."""
    events, replaced = list[str](), list[int]()
    last = process_group.rank() == process_group.world_size() - 1
    plan = BatchPlan(micro_batch=8, ranks=process_group.world_size(), accumulation=2)
    feed = Feed(_batches(fails_at if last else None, events), plan, CPU)
    try:
        for step in range(steps):
            for _ in feed.of_step(step, more=step + 1 < steps):
                events.append("backward")
            replaced.append(len(feed.faults))
            events.append(f"step {step} of {' '.join(feed.samples)}")
        feed.close()
    except UserError as error:
        return events, replaced, str(error) if error.everywhere else "known to one rank"
    return events, replaced, ""


def _collectives(folder: str) -> list[bool]:
    """Of sums between hosts while steps are taken: whether each is begun and read later."""
    begun, reduce = list[bool](), dist.all_reduce

    def recorded(x: torch.Tensor, *args: Any, async_op: bool = False, **options: Any) -> Any:
        begun.append(async_op)
        return reduce(x, *args, async_op=async_op, **options)

    config = validate(small_config(folder, "s", train={"steps": 6}))
    plan = BatchPlan(micro_batch=8, ranks=process_group.world_size(), accumulation=1)
    feed = Feed(_batches(None, []), plan, CPU)
    run = Run(config, plan, CPU, SimpleNamespace(), feed, Progress(0, "s"))  # type: ignore[arg-type]
    stop = actions.Stop(SimpleNamespace(reason=str))  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", recorded)
        for step in range(6):
            list(feed.of_step(step, more=step < 5))
            run.progress.step = step + 1
            stop(run, SimpleNamespace())  # type: ignore[arg-type]
        feed.close()
    return begun


def test_no_sum_between_hosts_is_waited_for_where_it_is_begun(tmp_path: Path) -> None:
    for begun in run_ranks(_collectives, 2, str(tmp_path)):
        assert begun == [True] * 11  # one for each batch, one for each step but the last


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_next_batch_is_asked_for_behind_the_backward_pass(ranks: int) -> None:
    for events, replaced, error in run_ranks(_fed, ranks, 2, None):
        assert events == [
            "read 0", "backward", "read 1", "backward", "read 2", "step 0 of a.tar/0 a.tar/1",
            "backward", "read 3", "backward", "step 1 of a.tar/2 a.tar/3",
        ]  # fmt: skip
        assert replaced == [1, 0]
        assert not error


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_read_that_fails_on_one_rank_ends_all_after_the_step_before(ranks: int) -> None:
    for events, replaced, error in run_ranks(_fed, ranks, 5, 4):
        assert [event for event in events if event.startswith("step")] == [
            "step 0 of a.tar/0 a.tar/1",
            "step 1 of a.tar/2 a.tar/3",
        ]
        assert len(replaced) == 2
        assert error == "a.tar cannot be read."
