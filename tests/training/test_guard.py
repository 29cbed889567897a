"""Steps that came to no numbers: how many are too many, and which samples of which ranks could be why."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import small_config
from ranks import run_ranks

from lejepa_scale.checkpoint import Progress
from lejepa_scale.config import BatchPlan, validate
from lejepa_scale.errors import UserError
from lejepa_scale.parallel import process_group
from lejepa_scale.training.guard import Guard, causes
from lejepa_scale.training.run import Run
from lejepa_scale.training.step import StepResult

pytestmark = pytest.mark.unchecked


def make_run(folder: Path, step: int = 0, **sections: dict[str, Any]) -> Run:
    config = validate(small_config(folder, "s", **sections))
    rank = process_group.rank()
    feed: Any = SimpleNamespace(samples=[f"{rank}.tar/{i}" for i in range(6)])
    plan = BatchPlan(micro_batch=3, ranks=process_group.world_size(), accumulation=2)
    return Run(config, plan, torch.device("cpu"), SimpleNamespace(), feed, Progress(step, "s"))  # type: ignore[arg-type]


def a_result(finite: bool, bad: list[int] = []) -> StepResult:  # noqa: B006
    """Two micro-batches of three samples; `bad` ones have a feature that is no number."""
    features = torch.zeros(6, 4)
    for place, value in zip(bad, [math.nan, math.inf, -math.inf] * 2, strict=False):
        features[place, place % 4] = value
    outputs = [{"features": part} for part in features.split(3)]
    return StepResult(outputs, torch.tensor(1.0), torch.tensor(finite))


def test_steps_that_are_not_finite_are_counted_and_too_many_in_a_row_stop_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, guard = make_run(tmp_path, step=5, train={"max_nonfinite": 3}), Guard()
    caplog.set_level(logging.INFO)
    for step, finite in enumerate((False, False, True, False, False), start=5):
        run.progress.step = step
        guard(run, a_result(finite))
    assert run.progress.nonfinite == 3  # of all but the last step, which nobody waits for
    assert "step 8: the gradient is not finite" in caplog.text
    assert "The features of every sample are finite" in caplog.text
    run.progress.step = 10
    guard(run, a_result(finite=False))
    with pytest.raises(
        UserError, match=r"3 non-finite steps in a row up to step 10 \(train.max_nonfinite = 3\)"
    ) as error:
        guard(run, a_result(finite=True))
    assert error.value.everywhere


def _guarded(folder: str) -> int:
    """Step 1: two samples of the last rank. Step 2: none. Step 3: all of all ranks. Step 4 is well."""
    run, guard = make_run(Path(folder)), Guard()
    last = process_group.rank() == process_group.world_size() - 1
    for step, result in enumerate(
        [a_result(False, [1, 5] if last else []), a_result(False), a_result(False, [*range(6)]), a_result(True)],
        start=1,
    ):
        run.progress.step = step
        guard(run, result)
    return run.progress.nonfinite


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_samples_of_every_rank_are_listed(tmp_path: Path, ranks: int) -> None:
    assert run_ranks(_guarded, ranks, str(tmp_path)) == [3] * ranks
    lines = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    last = ranks - 1
    assert lines[0] == {"step": 1, "samples": 6 * ranks, "of_ranks": {str(last): [f"{last}.tar/1", f"{last}.tar/5"]}}
    assert lines[1]["of_ranks"] == {}
    assert [len(names) for names in lines[2]["of_ranks"].values()] == [6] * ranks


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([([], 4), (["b.tar/7"], 4)], "1 of 8 samples have features that are not: b.tar/7 (rank 1)."),
        ([([f"a/{i}" for i in range(11)], 12)], "a/7 (rank 0) and 3 more (nonfinite.jsonl)."),
        ([([], 4), ([], 4)], "it is the loss or its gradient"),
        ([(["a", "b"], 2), (["c"], 1)], "No sample of 3 has finite features"),
    ],
)
def test_the_sentence_says_what_it_can_be(found: list[tuple[list[str], int]], said: str) -> None:
    assert said in causes(found)
