"""Evaluation while training: its numbers, what it leaves alone, its time, and collapse."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, Command, small_config

from lejepa_scale.checkpoint import Saved, find
from lejepa_scale.checkpoint.metrics import read_metrics
from lejepa_scale.config import validate
from lejepa_scale.data.make import sources
from lejepa_scale.data.make.writer import write_shards
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation import Options, evaluate
from lejepa_scale.training import evaluating
from lejepa_scale.training.collapse import CollapseWatch
from lejepa_scale.training.loop import train

WITH_LABELS = {"eval_knn", "eval_linear"}
WITHOUT = {
    "eval_effective_rank", "eval_std", "eval_rankme", "eval_alpha_req", "eval_spectrum_1", "eval_spectrum_128",
    "eval_embedding_effective_rank", "eval_embedding_std", "eval_normality", "eval_normality_worst", "eval_lidar",
    "eval_loss", "eval_loss_prediction", "eval_loss_sigreg", "eval_loss_normalized", "eval_seconds", "eval_time_share",
}  # fmt: skip

AVERAGE = {"kind": "ema", "decay": 0.5, "every": 1, "start": 0.5}


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 scenes that no other fixture has."""
    out = tmp_path_factory.mktemp("held_out")
    source = sources.scenes(64, 32, 7, "png", 90)
    write_shards(source.samples, out, per_shard=40, total=64, classes=source.classes, description={})
    return out


def tree(run: Path, scenes: Path, held_out: Path | None, **sections: dict[str, Any]) -> dict[str, Any]:
    own = {"every": 2, "test": str(held_out), "view_images": 32, "time_share": 1.0} if held_out is not None else {}
    return small_config(run, scenes, **{**sections, "evaluation": {**own, **sections.get("evaluation", {})}})


def records(run: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run / "metrics.jsonl") if "eval_seconds" in record]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record]


def test_everything_is_reported_at_its_step(scenes: Path, held_out: Path, tmp_path: Path) -> None:
    train(validate(tree(tmp_path / "run", scenes, held_out, train={"steps": 5})))
    found = records(tmp_path / "run")
    assert [record["step"] for record in found] == [2, 4, 5]
    assert found[-1].keys() >= WITH_LABELS | WITHOUT
    assert all(isinstance(value, int | float) and math.isfinite(value) for value in found[-1].values())
    assert sum(found[-1][f"eval_spectrum_{2**i}"] for i in range(8)) <= 1
    assert found[-1]["eval_loss_normalized"] == pytest.approx(found[-1]["eval_loss"] / 0.05**0.4)
    state = Saved(find(tmp_path / "run")).path / "state.json"
    assert json.loads(state.read_text())["metrics"]["eval_knn"] == found[-1]["eval_knn"]


def test_numbers_are_those_of_lejepa_evaluate(scenes: Path, held_out: Path, tmp_path: Path) -> None:
    """All images of both sets: the same features, scored by code that is tested against scikit-learn."""
    run = tmp_path / "run"
    train(validate(tree(run, scenes, held_out, evaluation={"k": 7}, average=AVERAGE)))
    found = evaluate(run, str(scenes), str(held_out), options=Options(("knn",), ks=(7,)), beside=False)
    first, last = records(run)[0], records(run)[-1]
    for weights, prefix in (("trained", "eval_"), ("averaged", "eval_average_")):
        assert last[f"{prefix}knn"] == pytest.approx(found.value(weights, "knn"))
        rank = found.value(weights, "spectrum", "effective_rank")
        assert last[f"{prefix}effective_rank"] == pytest.approx(rank, rel=1e-4)
    assert last["eval_average_loss"] != last["eval_loss"]
    numbers = {name.removeprefix("eval_") for name in last if not name.startswith("eval_average_")}
    assert {name for name in last if name.startswith("eval_average_")} == {
        f"eval_average_{name}" for name in numbers - {"step", "seconds", "time_share"}
    }
    assert not any(name.startswith("eval_average_") for name in first)  # at step 2 it had not begun


@pytest.mark.parametrize(
    "model",
    [
        pytest.param({"drop_path": 0.3}, id="vit"),
        pytest.param({"encoder": "resnet10t", "options": {}}, id="resnet", marks=pytest.mark.slow),
    ],
)
def test_training_is_the_same_with_it_and_without(
    model: dict[str, Any], scenes: Path, held_out: Path, tmp_path: Path
) -> None:
    """To the last bit: parameters, running averages, moments, the average of the weights, and what is drawn."""
    for name, test in (("with", held_out), ("without", None)):
        own = tree(
            tmp_path / name, scenes, test, model=model, evaluation={"every": 1} if test else {},
            average=AVERAGE | {"start": 0.0},
        )  # fmt: skip
        train(validate(own))
    assert len(records(tmp_path / "with")) == 4
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    ours, theirs = (Saved(find(tmp_path / name)) for name in ("with", "without"))
    for kind in ("value", "exp_avg", "exp_avg_sq", "average"):
        for name in ours.shapes_of(kind):
            assert torch.equal(ours.whole(name, kind), theirs.whole(name, kind)), name


def test_the_loss_of_images_that_are_trained_on_is_a_training_loss(scenes: Path, tmp_path: Path) -> None:
    """At a learning rate of almost nothing, on the training set: what the run reports of the same step."""
    settings = {"test": str(scenes), "every": 4, "view_images": 16}
    config = tree(tmp_path / "run", scenes, None, evaluation=settings, optim={"lr": 1e-12}, train={"steps": 4})
    train(validate(config))
    of_run = read_metrics(tmp_path / "run/metrics.jsonl")
    first = next(record for record in of_run if record.get("loss") is not None)
    found = records(tmp_path / "run")[-1]
    assert found["eval_loss_prediction"] == pytest.approx(first["loss_prediction"], rel=1e-4)  # has no directions
    assert found["eval_loss_sigreg"] == pytest.approx(first["loss_sigreg"], rel=0.2)  # other directions


def test_normality_is_that_of_a_gaussian_where_embeddings_are_one() -> None:
    features = torch.randn(2000, 8)
    found = evaluating.without_labels(
        evaluating.Encoded(features, torch.randn(2000, 256), torch.full((2000,), -1)), seed=0
    )
    assert found["normality"] == pytest.approx(1.0525, rel=0.2)
    assert found["embedding_std"] == pytest.approx(1, rel=0.02)
    assert found["embedding_effective_rank"] == pytest.approx(256, rel=0.05)
    wide = evaluating.without_labels(
        evaluating.Encoded(features, 2 * torch.randn(2000, 256), torch.full((2000,), -1)), seed=0
    )
    assert wide["normality"] > 20


@pytest.mark.parametrize(
    ("engine", "worlds"),
    [
        ("ddp", (2, 4)),
        pytest.param("fsdp", (1, 2, 4), marks=pytest.mark.slow),
        pytest.param("zero3", (1, 2), marks=pytest.mark.slow),
        pytest.param("zero1", (2,), marks=pytest.mark.slow),
    ],
)
def test_numbers_do_not_depend_on_the_ranks(
    engine: str, worlds: tuple[int, ...], scenes: Path, held_out: Path, tmp_path: Path, command: Command
) -> None:
    """With exact accumulation, since a micro-batch of other ranks is another statistic."""

    def run(name: str, engine: str, world: int) -> dict[str, Any]:
        sections = {"train": {"steps": 2, "global_batch": 16, "micro_batch": 4}, "objective": {"accumulation": "exact"}}
        own = tree(tmp_path / name, scenes, held_out, engine={"name": engine, "precision": "fp32"}, **sections)
        result = command(ROOT / "launchers/train.py", "--config", command.config(own), ranks=world)
        assert result.returncode == 0, result.stderr
        (found,) = records(tmp_path / name)
        return found

    expected = run("alone", "single", 0)
    for world in worlds:
        found = run(f"{world}", engine, world)
        assert found.keys() == expected.keys()
        for name in (WITHOUT | WITH_LABELS) - {"eval_seconds", "eval_time_share"}:
            near = {"abs": 1 / 64 + 1e-9} if name in WITH_LABELS else {"rel": 5e-3}
            assert found[name] == pytest.approx(expected[name], **near), name


def test_it_keeps_to_its_share_of_the_time(
    scenes: Path, held_out: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first and the last one come in any case; what is put off is told of once."""
    caplog.set_level(logging.INFO)
    settings = {"every": 1, "time_share": 1e-6, "images": 32, "view_images": 0}
    train(validate(tree(tmp_path / "run", scenes, held_out, evaluation=settings, train={"steps": 6})))
    found = records(tmp_path / "run")
    assert [record["step"] for record in found] == [1, 6]
    assert "eval_loss" not in found[0]
    assert sum("put off" in message for message in caplog.messages) == 1
    rates = [r["images_per_second"] for r in read_metrics(tmp_path / "run/metrics.jsonl") if "images_per_second" in r]
    assert len(rates) == 6


def test_rates_leave_out_the_time_of_evaluations(
    scenes: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that runs backwards for evaluations alone, which then lengthen what is called training."""
    clock = SimpleNamespace(monotonic=iter(range(0, -100_000, -50)).__next__)
    monkeypatch.setattr(evaluating, "time", clock)
    monkeypatch.setattr(evaluating.Evaluate, "_numbers", lambda self, run: {})
    train(validate(tree(tmp_path / "run", scenes, held_out, evaluation={"every": 1}, train={"steps": 2})))
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    assert lines[0]["eval_seconds"] == -50
    (last,) = (line["images_per_second"] for line in lines if line["step"] == 2 and "loss" in line)
    assert last == pytest.approx(16 / 50, rel=0.2)


def test_without_labels_there_is_no_probe(scenes: Path, held_out: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    source = sources.scenes(32, 32, 9, "png", 90)
    plain = (replace(sample, label=None) for sample in source.samples)
    write_shards(plain, bare, per_shard=32, total=32, classes=(), description={})
    train(validate(tree(tmp_path / "run", scenes, bare)))
    assert not WITH_LABELS & records(tmp_path / "run")[-1].keys()
    assert records(tmp_path / "run")[-1].keys() >= WITHOUT


def test_the_best_checkpoint_may_be_one_by_an_evaluation(scenes: Path, held_out: Path, tmp_path: Path) -> None:
    kept = {"best": "max:eval_knn", "every": 1, "keep": 3}
    train(validate(tree(tmp_path / "run", scenes, held_out, checkpoint=kept, train={"steps": 6})))
    assert "eval_knn" not in _metrics(tmp_path / "run", 5)  # steps 2, 4 and 6 were evaluated
    best = max(records(tmp_path / "run"), key=lambda record: record["eval_knn"])
    assert (tmp_path / "run/best_checkpoint").read_text().split()[1:] == ["eval_knn", str(best["eval_knn"])]
    with pytest.raises(UserError, match="no metric of that name"):
        train(validate(tree(tmp_path / "b", scenes, held_out, checkpoint={**kept, "best": "max:eval_kn"})))


def _metrics(run: Path, step: int) -> dict[str, Any]:
    """Of a checkpoint."""
    found: dict[str, Any] = json.loads((run / f"checkpoints/step_{step:08d}/state.json").read_text())["metrics"]
    return found


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"evaluation": {"every": 2}}, "needs evaluation.test"),
        ({"evaluation": {"test": "x"}}, "only where evaluation.every is set"),
        ({"evaluation": {"every": 2, "test": "none-{0..2}.tar"}}, "none-0.tar"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_the_first_step(
    sections: dict[str, Any], said: str, scenes: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        train(validate(small_config(tmp_path / "run", scenes, **sections)))
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_tensorboard_has_what_metrics_have(scenes: Path, held_out: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = {"every": 1, "tensorboard": {"enabled": True}}
    train(validate(tree(tmp_path / "run", scenes, held_out, log=settings)))
    found = accumulator.EventAccumulator(str(tmp_path / "run/tensorboard"))
    found.Reload()
    assert [e.value for e in found.Scalars("training/loss")] == pytest.approx(losses(tmp_path / "run"))
    knn = [(r["step"], r["eval_knn"]) for r in records(tmp_path / "run")]
    assert [(e.step, e.value) for e in found.Scalars("evaluation/knn")] == [(s, pytest.approx(v)) for s, v in knn]


# -- collapse


def watch(scenes: Path, **sections: dict[str, Any]) -> CollapseWatch:
    return CollapseWatch(validate(small_config("run", scenes, **sections)), samples=256)


def test_a_collapse_is_told_of_once_with_what_to_do(scenes: Path, caplog: pytest.LogCaptureFixture) -> None:
    looking = watch(scenes, optim={"warmup_steps": 10})
    for step, rank, std in [(10, 1, 1), (20, 1, 1), (30, 9, 1), (40, 9, 0.05), (50, math.nan, math.nan), (60, 9, 0.01)]:
        looking.look(step, rank, std)
    assert [message.partition(":")[0] for message in caplog.messages] == ["step 60"]
    assert "raise objective.lambda (now 0.05)" in caplog.text
    assert "use a larger batch (now 16 images" in caplog.text
    for step, std in [(70, 1), (80, 0.01), (90, 0.15), (100, 1), (110, 1)]:
        looking.look(step, 9, std)
    assert "step 110: the embeddings are no longer collapsed" in caplog.messages[-1]
    assert len(caplog.messages) == 2
    of_rank = watch(scenes)
    for step in (1, 2):
        of_rank.look(step, 1.81, 1.0)  # of 17 directions: the floor is 1 + 0.05 x 16
    assert len(caplog.messages) == 2
    for step in (3, 4):
        of_rank.look(step, 1.79, 1.0)
    assert "effective rank 1.8 of 17" in caplog.messages[-1]
    never = watch(scenes, evaluation={"rank_floor": 0.0, "std_floor": 0.0})
    for step in (1, 2):
        never.look(step, 1.0, 0.0)
    assert len(caplog.messages) == 3


def test_a_run_tells_of_its_collapse(scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Almost without a regularizer and with a high rate, embeddings become one point: prediction is easiest there."""
    sections = {"objective": {"lambda": 1e-9}, "optim": {"lr": 0.05}, "train": {"steps": 60, "global_batch": 16}}
    train(validate(small_config(tmp_path / "run", scenes, **sections)))
    assert sum("the embeddings have collapsed" in message for message in caplog.messages) == 1
    assert read_metrics(tmp_path / "run/metrics.jsonl")[-1]["embedding_std"] < 0.1
