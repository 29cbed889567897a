"""Ranking runs without labels: the order, how sure it is, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import small_config
from scipy import stats

from lejepa_scale.cli.main import main
from lejepa_scale.config import dump, validate
from lejepa_scale.errors import UserError
from lejepa_scale.operations import agreement, selection, selection_report


def run(folder: Path, name: str, losses: list[float | None], **sections: dict[str, Any]) -> Path:
    """A run's directory, as a selection sees it: losses, of 20 steps each, and a checkpoint of its last step."""
    path, steps = folder / name, 20 * len(losses)
    own = dict(sections)
    ranks, prints = own.pop("ranks", 1), own.pop("fingerprint", "abc")
    stands = own.pop("stands", steps)
    tree = small_config(path, "shards", **{"train": {"steps": steps}, **own})
    checkpoint = path / f"checkpoints/step_{stands:08d}"
    checkpoint.mkdir(parents=True)
    for place in (path, checkpoint):
        (place / "config.yaml").write_text(dump(validate(tree)))
    lines = [{"step": 20 * (i + 1), "loss": loss} for i, loss in enumerate(losses)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (checkpoint / "state.json").write_text(json.dumps({"step": stands, "data_fingerprint": prints}))
    index = {"ranks": ranks, "kinds": ["value"], "parameters": {}, "buffers": {}}
    (checkpoint / "index.json").write_text(json.dumps(index))
    marks = {name: {"bytes": 0, "crc32": 0} for name in ("state.json", "index.json", "config.yaml")}
    (checkpoint / "COMPLETE").write_text(json.dumps(marks))
    return path


def noisy(mean: float, seed: int, spread: float = 0.01, count: int = 100) -> list[float]:
    return (mean + spread * np.random.default_rng(seed).standard_normal(count)).tolist()


def weighed(value: float, **more: Any) -> dict[str, Any]:
    return {"objective": {"lambda": value, **more}}


def test_the_score_is_the_last_losses_over_lambda_to_alpha(tmp_path: Path) -> None:
    flat = [9.0] * 90
    paths = [
        run(tmp_path, "a", [*flat, *[0.5] * 10], **weighed(0.1)),
        run(tmp_path, "b", [*flat, *[0.3] * 10], **weighed(0.01)),
    ]
    found = selection.select(paths)
    assert [one.name for one in found.ranked] == ["a", "b"]
    assert [one.score for one in found.ranked] == pytest.approx([0.5 / 0.1**0.4, 0.3 / 0.01**0.4])
    assert [one.loss for one in found.ranked] == pytest.approx([0.5, 0.3])
    assert [one.name for one in selection.select(paths, alpha=0).ranked] == ["b", "a"]
    assert [(one.low, one.high, one.best) for one in found.ranked] == [
        (pytest.approx(one.score), pytest.approx(one.score), best)
        for one, best in zip(found.ranked, (1, 0), strict=True)
    ]
    assert found.differing == ["objective.lambda"]
    assert selection.select(paths, window=0.2).ranked[0].loss == pytest.approx((9 + 0.5) / 2)


def test_a_window_has_five_records_where_there_are_so_many(tmp_path: Path) -> None:
    runs = [selection.read_run(run(tmp_path, str(n), [9.0] * 20 + [1.0] * n)) for n in (2, 5)]
    assert [len(one.losses) for one in runs] == [5, 5]
    assert runs[0].loss == pytest.approx((3 * 9 + 2) / 5)
    few = selection.read_run(run(tmp_path, "few", [1.0, 2.0]))
    assert few.loss == pytest.approx(1.5)


def test_intervals_are_those_of_a_mean(tmp_path: Path) -> None:
    """Against the closed form: 1.96 standard deviations over the root of the records."""
    paths = [run(tmp_path, "a", noisy(1.0, 1, count=1000)), run(tmp_path, "b", noisy(2.0, 2, count=1000), run={"seed": 1},
             optim={"lr": 1e-3})]  # fmt: skip
    one = selection.select(paths, alpha=0).ranked[0]
    losses = selection.read_run(paths[0]).losses
    half = 1.96 * float(np.std(losses)) / math.sqrt(len(losses))
    assert len(losses) == 100
    assert (one.high - one.low) / 2 == pytest.approx(half, rel=0.08)


def test_runs_that_met_the_same_images_share_their_noise(tmp_path: Path) -> None:
    """A loss that is always a little higher is surely worse, however much both of them move; of others nobody knows."""
    shared = noisy(1.0, 1, spread=0.2)
    a = run(tmp_path, "a", [x + 0.01 for x in shared], optim={"lr": 1e-3})
    b = run(tmp_path, "b", shared, optim={"lr": 2e-3})
    c = run(tmp_path, "c", [x + 0.01 for x in noisy(1.0, 1, spread=0.2)], run={"seed": 5}, optim={"lr": 2e-3})
    same = selection.select([a, b])
    assert [one.name for one in same.ranked] == ["b", "a"]
    assert same.ranked[0].best == 1.0
    assert same.tied == []
    assert same.ranked[0].places == (1, 1)
    other = selection.select([a, c])
    assert 0.2 < other.ranked[0].best < 0.8
    assert len(other.tied) == 1
    assert other.ranked[0].places == (1, 2)
    assert "Not told apart" in selection_report.conclusion(other)


def test_seeds_are_repeats(tmp_path: Path) -> None:
    paths = [run(tmp_path, f"a{i}", [x] * 50, run={"seed": i}, optim={"lr": 1e-3}) for i, x in enumerate((1.0, 1.2))]
    paths += [run(tmp_path, f"b{i}", [x] * 50, run={"seed": i}, optim={"lr": 2e-3}) for i, x in enumerate((1.3, 1.4))]
    found = selection.select(paths, alpha=0)
    assert [(one.name, one.loss) for one in found.ranked] == [
        ("a0, a1", pytest.approx(1.1)),
        ("b0, b1", pytest.approx(1.35)),
    ]
    assert found.ranked[0].high - found.ranked[0].low == pytest.approx(0.2)  # that of two repeats, drawn again
    assert "another run.seed" not in selection_report.conclusion(found)


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"fingerprint": "other"}, "data.shards"),
        ({"data": {"views": {"global": {"count": 2, "size": 32, "scale": [0.3, 1.0]}}}}, "data.views.global.scale"),
        ({"data": {"augment": {"blur": 0.1}}}, "data.augment.blur"),
        ({"objective": {"weighting": "additive"}}, "objective.weighting"),
        ({"objective": {"sigreg": {"estimator": "u"}}}, "objective.sigreg.estimator"),
        ({"objective": {"regularizer": "weak_sigreg"}}, "objective.regularizer"),
        ({"objective": {"regularizer": "visreg"}}, "objective.regularizer"),
        ({"objective": {"visreg": {"weight": 0.1}}}, "objective.visreg.weight"),
        ({"model": {"projector": {"dim": 18}}}, "model.projector.dim"),
        ({"model": {"predictor": {}}}, "model.predictor"),
        ({"train": {"steps": 40, "global_batch": 32}}, "regularizer meets at once: 16 in a, 32 in b"),
        ({"train": {"steps": 40, "global_batch": 32, "micro_batch": 8}}, "regularizer meets at once: 16 in a, 8 in b"),
    ],
)  # fmt: skip
def test_losses_that_do_not_mean_the_same_are_refused(tmp_path: Path, sections: dict[str, Any], named: str) -> None:
    paths = [run(tmp_path, "a", [1.0, 1.0]), run(tmp_path, "b", [2.0, 2.0], **sections)]
    with pytest.raises(UserError, match="do not mean the same") as error:
        selection.select(paths)
    assert named in str(error.value)


def test_what_changes_no_meaning_is_compared(tmp_path: Path) -> None:
    base = run(tmp_path, "a", [1.0] * 9)
    others = [
        run(tmp_path, "wide", [2.0] * 9, model={"options": {"depth": 3}}),
        run(tmp_path, "long", [3.0] * 12, optim={"lr": 0.1}),
        run(tmp_path, "slices", [4.0] * 9, objective={"sigreg": {"num_slices": 64}}),
        run(tmp_path, "ranks", [5.0] * 9, train={"steps": 180, "micro_batch": 8}, engine={"name": "ddp"}, ranks=2),
    ]
    assert [one.name for one in selection.select([base, *others]).ranked] == ["a", "wide", "long", "slices", "ranks"]


def test_a_difference_may_be_allowed_by_name(tmp_path: Path) -> None:
    paths = [
        run(tmp_path, "a", [1.0] * 9),
        run(tmp_path, "b", [2.0] * 9, data={"augment": {"blur": 0.1}}, fingerprint="x"),
    ]
    found = selection.select(paths, across=["data.augment", "data.shards"])
    assert len(found.ranked) == 2
    with pytest.raises(UserError, match=r"--across optim\.lr: no comparison is refused"):
        selection.select(paths, across=["optim.lr"])


def test_unfinished_and_diverged_runs_are_not_among_the_best(tmp_path: Path) -> None:
    a, b = run(tmp_path, "a", [1.0] * 9), run(tmp_path, "b", [2.0] * 9, optim={"lr": 0.1})
    half = run(tmp_path, "half", [0.1] * 9, stands=120, optim={"lr": 0.2})
    lost = run(tmp_path, "lost", [0.1] * 8 + [None], optim={"lr": 0.3})
    with (lost / "metrics.jsonl").open("a") as file:  # what no run of ours writes
        file.write('{"step": 180, "loss": "low"}\n{"step": Infinity, "loss": 1}\n')
    found = selection.select([lost, half, b, a])
    assert [one.name for one in found.ranked] == ["a", "b", "lost"]
    assert found.left_out == ["half stands at step 120 of 180"]
    assert math.isnan(found.ranked[-1].score)
    assert "left out: half stands at step 120 of 180" in selection_report.conclusion(found)
    assert [one.name for one in selection.select([half, a], unfinished=True).ranked] == ["half", "a"]
    with pytest.raises(UserError, match="there is one; left out: half stands at step 120 of 180"):
        selection.select([half, a])
    assert json.dumps(selection_report.as_json(found), allow_nan=False)


def test_a_run_that_has_saved_nothing_yet_is_left_out(tmp_path: Path) -> None:
    import shutil

    a, b, new = (
        run(tmp_path, name, [1.0] * 9, optim={"lr": lr}) for name, lr in (("a", 0.1), ("b", 0.2), ("new", 0.3))
    )
    shutil.rmtree(new / "checkpoints")
    (new / "metrics.jsonl").write_text('{"step": 20, "loss": 0.1}\n')
    assert selection.select([a, b, new], unfinished=True).left_out == ["new stands at step 0 of 180"]


def test_folders_of_runs_and_what_is_none(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        run(tmp_path / folder, "a", [1.0] * 9, optim={"lr": {"x": 0.1, "y": 0.2}[folder]})
    (tmp_path / "x" / "logs").mkdir()
    for named in ([tmp_path / "x", tmp_path / "y"], [tmp_path]):
        assert {one.name for one in selection.select(named).ranked} == {"x/a", "y/a"}
    with pytest.raises(UserError, match="holds no run"):
        selection.select([tmp_path / "x" / "logs"])
    (tmp_path / "x/a/config.yaml").write_text("run: [")
    with pytest.raises(UserError, match=r"x/a/config\.yaml cannot be read"):
        selection.select([tmp_path / "x", tmp_path / "y"])
    with pytest.raises(UserError, match="--window"):
        selection.select([tmp_path / "x", tmp_path / "y"], window=0)


# -- against labels


def test_spearman_is_scipys() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        x, y = generator.integers(6, size=12).astype(float), generator.standard_normal(12).round(1)
        assert agreement.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert math.isnan(agreement.spearman(np.ones(5), np.arange(5.0)))


def rising(tmp_path: Path, count: int = 12) -> tuple[list[Path], list[float]]:
    """Runs whose accuracy falls with loss / lambda^0.5, and whose loss itself grows with lambda."""
    generator, paths, accuracies = np.random.default_rng(3), [], []
    for i in range(count):
        lam, score = float(np.exp(generator.uniform(-5, -1))), float(generator.uniform(1, 2))
        paths.append(run(tmp_path, f"r{i}", [score * lam**0.5] * 9, **weighed(lam)))
        accuracies.append(1 - score / 4)
    return paths, accuracies


def test_the_best_alpha_is_found(tmp_path: Path) -> None:
    paths, accuracies = rising(tmp_path)
    found = agreement.agreements([selection.read_run(path) for path in paths], accuracies)
    assert found.best.value == pytest.approx(1.0)
    assert found.best.low == pytest.approx(1.0)
    assert found.best_low <= found.best.alpha <= found.best_high
    assert abs(found.best.alpha - 0.5) <= 0.1
    assert [one.alpha for one in found.asked] == [0.0, 0.4]
    assert found.asked[0].low < found.asked[0].value < found.asked[0].high
    losses = [selection.read_run(path).loss for path in paths]
    assert found.asked[0].value == pytest.approx(-stats.spearmanr(losses, accuracies).statistic)


def test_the_command_ranks_compares_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths, accuracies = rising(tmp_path / "runs")
    for path, accuracy in zip(paths, accuracies, strict=True):
        rows = [{"protocol": "knn", "metrics": {"top1": 0.0}}, {"protocol": "logistic", "metrics": {"top1": accuracy}}]
        (path / "evaluation.json").write_text(json.dumps({"results": rows}))
    plot, order = tmp_path / "plot.png", tmp_path / "order.json"
    words = ["select", tmp_path / "runs", "--against", "logistic", "--plot", plot, "--json", order, "--alpha", "0.5"]
    assert main([str(word) for word in words]) == 0
    said = capsys.readouterr().out
    assert "alpha = 0.5: +1.00 (+1.00 to +1.00)" in said
    assert plot.stat().st_size > 10_000
    written = json.loads(order.read_text())
    best = min(zip(accuracies, paths, strict=True), key=lambda pair: -pair[0])[1]
    assert written["ranked"][0]["runs"] == [str(best)]
    assert written["against"]["best"]["value"] == pytest.approx(1.0)
    assert main(["select", str(tmp_path / "runs"), "--against", "linear"]) == 2
    assert "evaluate with --protocols linear" in capsys.readouterr().err
    (paths[0] / "evaluation.json").unlink()
    assert main(["select", str(tmp_path / "runs"), "--against", "logistic"]) == 2
    assert f"lejepa evaluate {paths[0]} --train" in capsys.readouterr().err
    assert main(["select", str(tmp_path / "runs"), "--plot", "x.png"]) == 2


def terms(path: Path, pairs: list[tuple[float, float]], **state: Any) -> Path:
    """Put the terms of losses into a run's records, and what else its checkpoint says."""
    lines = [
        {"step": 20 * (i + 1), "loss": 9.0, "loss_prediction": prediction, "loss_sigreg": regularizer}
        for i, (prediction, regularizer) in enumerate(pairs)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (file,) = path.glob("checkpoints/*/state.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **state}))
    return path


def test_a_lambda_that_moves_is_that_of_the_end(tmp_path: Path) -> None:
    """Terms that stay as they are give one loss, however lambda has moved on the way."""
    pairs = [(0.5, 2.0)] * 10
    a = terms(run(tmp_path, "a", [9.0] * 10, **weighed(0.2, final_lambda=0.01)), pairs)
    b = run(tmp_path, "b", [0.99 * 0.5 + 0.01 * 2] * 10, **weighed(0.01))
    found = selection.select([a, b])
    assert [one.loss for one in found.ranked] == pytest.approx([0.515] * 2)
    assert [one.score for one in found.ranked] == pytest.approx([0.515 / 0.01**0.4] * 2)
    assert {one["lambda"] for one in selection_report.as_json(found)["ranked"]} == {0.01}
    assert found.differing == ["objective.lambda", "objective.final_lambda"]
    c = terms(run(tmp_path, "c", [9.0] * 10, **weighed(0.2, final_lambda=0.01, weighting="additive")), pairs)
    assert selection.read_run(c).loss == pytest.approx(0.5 + 0.01 * 2)
    d = terms(run(tmp_path, "d", [9.0] * 10, train={"steps": 399}, **weighed(0.2, final_lambda=0.01)), pairs)
    half = selection.read_run(d)  # 200 of 399 steps: half way
    assert half.lam == pytest.approx(0.105)
    assert half.loss == pytest.approx(0.895 * 0.5 + 0.105 * 2)
    assert selection.select([a, b, d]).left_out == ["d stands at step 200 of 399"]


def test_a_run_in_epochs_is_finished_by_the_size_of_its_data(tmp_path: Path) -> None:
    """16 images a step: an epoch of 1,600 is 100 steps."""
    length = {"steps": None, "epochs": 2}
    pairs = [(0.5, 2.0)] * 10
    a, b = (terms(run(tmp_path, name, [9.0] * 10, train=length), pairs, epoch=1600) for name in ("a", "b"))
    assert [selection.read_run(path).finished for path in (a, b)] == [True, True]
    longer = terms(run(tmp_path, "c", [9.0] * 10, train=length), pairs, epoch=1608)
    assert selection.read_run(longer).config.train.steps == 201
    unknown = terms(run(tmp_path, "d", [9.0] * 10, train=length), pairs)
    assert selection.select([a, b, longer, unknown]).left_out == [
        "c stands at step 200 of 201", "d stands at step 0 of 2 epochs",
    ]  # fmt: skip
