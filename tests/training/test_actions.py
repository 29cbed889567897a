"""What happens between steps: each action alone, on a run that is made up."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import small_config

from lejepa_scale.checkpoint import Progress
from lejepa_scale.checkpoint.saver import NotSaved
from lejepa_scale.config import BatchPlan, validate
from lejepa_scale.data.faults import Fault
from lejepa_scale.training import actions, loop
from lejepa_scale.training.guard import Guard
from lejepa_scale.training.monitor import Monitor, Phases
from lejepa_scale.training.probe import OnlineProbe
from lejepa_scale.training.run import Run
from lejepa_scale.training.step import StepResult

CPU = torch.device("cpu")
pytestmark = pytest.mark.unchecked  # engines, feeds and reporters are made up


def make_run(folder: Path, step: int = 0, **sections: dict[str, Any]) -> Run:
    config = validate(small_config(folder, "s", **sections))
    feed: Any = SimpleNamespace(samples=[f"a.tar/{i}" for i in range(4)], labels=[], faults=[])
    plan = BatchPlan(micro_batch=16, ranks=1, accumulation=1)
    return Run(config, plan, CPU, SimpleNamespace(), feed, Progress(step, "shards"))  # type: ignore[arg-type]


def a_result(loss: float = 1.0, finite: bool = True, batches: int = 1) -> StepResult:
    out = {
        "loss": torch.tensor(loss),
        "prediction": torch.tensor(0.5),
        "sigreg": torch.tensor(2.0),
        "features": torch.randn(4, 3),
        "embeddings": torch.randn(64, 3),
    }
    norm = torch.tensor(3.0 if finite else torch.nan)
    return StepResult([out] * batches, norm, torch.tensor(finite))


def monitor_of(run: Run) -> Monitor:
    return Monitor(run.config.run.dir, Phases(lambda name, *, unlimited: nullcontext()), CPU)


def test_replaced_samples_are_named_counted_and_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(tmp_path, step=7)
    caplog.set_level(logging.INFO)
    actions.quarantine(run, a_result())
    assert run.progress.skipped_images == 0
    assert not (tmp_path / "quarantine.jsonl").exists()
    run.feed.faults = [Fault("a.tar", "x", 512, "no image"), Fault("b.tar", "y", 1024, "cut")]
    actions.quarantine(run, a_result())
    assert run.progress.skipped_images == 2
    assert "step 7: replaced a.tar, sample x at byte 512: no image" in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["step"], line["shard"], line["key"]) for line in lines] == [(7, "a.tar", "x"), (7, "b.tar", "y")]


def test_what_came_of_a_step_is_known_before_it_is_saved(tmp_path: Path) -> None:
    run = make_run(tmp_path, step=5, checkpoint={"every": 5})
    logged: list[dict[str, float]] = []
    reporter: Any = SimpleNamespace(advance=lambda: None, log=lambda record: logged.append(record) or record)
    guard, report = Guard(), actions.Report(run, reporter, monitor_of(run))
    for action in (guard, report):
        action(run, a_result(finite=False))
    assert run.progress.nonfinite == 1
    assert (logged[0]["step"], logged[0]["nonfinite_steps"]) == (5, 1)
    run.progress.step = 6
    for action in (guard, report):
        action(run, a_result(finite=False))
    assert (run.progress.nonfinite, len(logged)) == (1, 1)
    run.progress.step, run.stopping = 7, "SIGTERM"
    for action in (guard, report):
        action(run, a_result())
    assert (run.progress.nonfinite, len(logged)) == (2, 3)
    assert report.last is logged[2]


def test_a_record_holds_means_since_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 104.0, 104.0, 106.0, 106.0])
    monkeypatch.setattr(actions.time, "monotonic", lambda: next(clock))
    run = make_run(tmp_path, log={"every": 2}, objective={"lambda": 0.05})
    logged: list[dict[str, float]] = []
    reporter: Any = SimpleNamespace(advance=lambda: None, log=logged.append)
    monitor = monitor_of(run)
    monitor.phases._seconds["data wait"] = 0.25
    report = actions.Report(run, reporter, monitor, [lambda: {"extra": torch.tensor(9.0)}])
    run.lr = 0.125
    for step, loss in enumerate((1.0, 3.0, 5.0, 7.0, 9.0), start=1):
        run.progress.step = step
        report(run, a_result(loss))
    assert [record["step"] for record in logged] == [2, 4]
    first, second = logged
    assert (first["loss"], second["loss"]) == (2.0, 6.0)
    assert first["loss_normalized"] == pytest.approx(2.0 / 0.05**0.4)
    assert (first["loss_prediction"], first["loss_sigreg"], first["grad_norm"]) == (0.5, 2.0, 3.0)
    assert (first["samples"], first["lr"], first["extra"]) == (32, 0.125, 9.0)
    assert first["images_per_second"] == 2 * 16 / 4  # two steps of 16 in four seconds
    assert second["images_per_second"] == 2 * 16 / 2
    assert first["data_wait_fraction"] == 0.25 / 4


def test_a_skipped_step_is_in_no_mean(tmp_path: Path) -> None:
    run = make_run(tmp_path, log={"every": 2})
    logged: list[dict[str, float]] = []
    reporter: Any = SimpleNamespace(advance=lambda: None, log=logged.append)
    report = actions.Report(run, reporter, monitor_of(run))
    for step, loss in enumerate((math.nan, 3.0, math.nan, math.nan, 1.0), start=1):
        run.progress.step = step
        report(run, a_result(loss, finite=math.isfinite(loss)))
    first, second = logged
    assert (first["loss"], first["grad_norm"]) == (3.0, 3.0)
    for name in ("loss", "loss_prediction", "loss_sigreg", "loss_normalized", "grad_norm", "effective_rank"):
        assert math.isfinite(first[name]), name
        assert math.isnan(second[name]), name


def test_a_skipped_step_teaches_the_probe_nothing(tmp_path: Path) -> None:
    run, probe = make_run(tmp_path), OnlineProbe(3, 4, 1e-2, 0, CPU)
    run.probe, run.feed.labels = probe, [torch.arange(4)]
    action = actions.Probe(CPU)
    action(run, a_result())
    before, hits = probe.state_dict(), action.hits.clone()
    action(run, a_result(finite=False))
    assert all(torch.equal(tensor, before[name]) for name, tensor in probe.state_dict().items())
    assert torch.equal(action.hits, hits)
    action(run, a_result())
    assert not torch.equal(probe.state_dict()["head.1.weight"], before["head.1.weight"])


def test_the_last_step_is_reported_and_saved_whenever_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    monkeypatch.setattr(actions.Save, "_begin", lambda self, run: saved.append(run.progress.step))
    run = make_run(tmp_path, train={"steps": 7}, checkpoint={"every": 3})
    save = actions.Save(run, SimpleNamespace())  # type: ignore[arg-type]
    for step in range(1, 8):
        run.progress.step = step
        save(run, a_result())
    assert saved == [3, 6, 7]


def test_a_signal_ends_the_loop_after_the_step_and_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order in which `train` hands actions to the loop; a signal in the last step stops nothing that is not over."""
    taken, met = list[int](), list[int]()
    monkeypatch.setattr(loop, "train_step", lambda *_, number, **__: taken.append(number) or a_result())
    saved: list[tuple[int, str]] = []
    monkeypatch.setattr(actions.Save, "_begin", lambda self, run: saved.append((run.progress.step, run.stopping)))
    run = make_run(tmp_path, train={"steps": 5}, checkpoint={"every": 100})
    run.feed.of_step = lambda number, more: iter(())  # type: ignore[method-assign]
    why = ""
    request: Any = SimpleNamespace(reason=lambda: why, met=lambda: met.append(run.progress.step))

    def ask(run: Run, result: StepResult) -> None:
        nonlocal why
        why = "SIGUSR1" if run.progress.step >= 2 else ""

    save = actions.Save(run, SimpleNamespace())  # type: ignore[arg-type]
    loop.loop(run, [ask, actions.Stop(request), save])
    assert taken == [0, 1]
    assert saved == [(2, "SIGUSR1")]
    assert met == [2]
    why = run.stopping = ""
    loop.loop(run, [actions.Stop(request), save])
    assert taken == [0, 1, 2, 3, 4]
    why = "SIGTERM"
    actions.Stop(request)(run, a_result())
    assert not run.stopping
    assert met == [2]


class _Disk:
    """In place of a Saver. Each of `asks` is the step whose save a stop comes in; failing: steps that cannot be saved."""

    def __init__(self, run: Run, asks: Sequence[int] = (), failing: Sequence[int] = (), seconds: float = 0.0) -> None:
        self.run, self.asks, self.failing, self.seconds = run, asks, failing, seconds
        self.why, self.saved, self.step = "", list[int](), 0

    def poll(self) -> None:
        pass

    def begin(self, progress: Progress, *_: Any) -> None:
        self.step = progress.step

    def finish(self) -> Path | None:
        step, self.step = self.step, 0
        if step in self.failing:
            raise NotSaved(f"step {step} is not saved: no room.")
        if step:
            self.saved.append(step)
            self.why = "SIGTERM" if step in self.asks else ""
            time.sleep(self.seconds)
        return self.run.config.run.dir / f"step_{step}" if step else None

    def save(self) -> actions.Save:
        save = actions.Save(self.run, SimpleNamespace(), asked=lambda: self.why)  # type: ignore[arg-type]
        save.saver = self  # type: ignore[assignment]
        return save


def _steps(run: Run, *after: Any) -> list[int]:
    taken = []
    while run.progress.step < run.config.train.steps and not run.stopping:
        run.progress.step += 1
        taken.append(run.progress.step)
        for action in after:
            action(run, a_result())
    return taken


def test_a_stop_while_a_save_is_waited_for_saves_no_second_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run = make_run(tmp_path, train={"steps": 9}, checkpoint={"every": 2, "mode": "sync"})
    disk = _Disk(run, asks=[4])
    assert _steps(run, disk.save()) == [1, 2, 3, 4]
    assert disk.saved == [2, 4]
    assert "stopped after step 4 (SIGTERM); saved" in caplog.text


def test_a_save_before_a_stop_that_fails_is_an_error_in_any_case(tmp_path: Path) -> None:
    """What is not saved is not "stopped, and saved", though a run that goes on would only be told of it."""
    run = make_run(tmp_path, train={"steps": 9}, checkpoint={"every": 2, "mode": "sync", "on_error": "continue"})
    disk = _Disk(run, failing=[2, 5])
    stop = actions.Stop(SimpleNamespace(reason=lambda: "SIGHUP" if run.progress.step == 5 else "", met=lambda: None))  # type: ignore[arg-type]
    with pytest.raises(NotSaved, match="step 5"):
        _steps(run, stop, disk.save())
    assert disk.saved == [4]


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, ""),
        ({"TORCHELASTIC_RUN_ID": "x"}, ""),
        ({"TORCHELASTIC_RUN_ID": "x", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "0.1"}, "0 s"),
    ],
)
def test_a_save_that_the_launcher_would_not_wait_for_is_told_of_once(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    told: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run = make_run(tmp_path, train={"steps": 5}, checkpoint={"every": 2, "mode": "sync"})
    _steps(run, _Disk(run, seconds=0.12).save())
    notices = [record.message for record in caplog.records if "a checkpoint takes" in record.message]
    assert len(notices) == bool(told)
    for notice in notices:
        assert f"torchrun kills its ranks {told} after it was told to stop, unless --shutdown-timeout says" in notice
        assert f"touch {tmp_path / 'stop'}" in notice


def test_the_probe_learns_from_every_micro_batch_and_is_read_once(tmp_path: Path) -> None:
    run, seen = make_run(tmp_path), []

    def learn(features: torch.Tensor, labels: torch.Tensor, finite: torch.Tensor) -> torch.Tensor:
        seen.append((features.shape, labels.tolist()))
        return torch.tensor([3.0, 4.0], dtype=torch.float64)

    run.probe = SimpleNamespace(step=learn)  # type: ignore[assignment]
    run.feed.labels = [torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5, 6, 7])]
    probe = actions.Probe(CPU)
    assert probe.reading()["probe_accuracy"].isnan()
    probe(run, a_result(batches=2))
    assert [labels for _, labels in seen] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert probe.reading() == {"probe_accuracy": torch.tensor(6 / 8, dtype=torch.float64)}
    assert probe.reading()["probe_accuracy"].isnan()
