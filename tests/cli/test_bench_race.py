"""The methods that ours is raced against, by their papers' formulas, and the race itself at toy size."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from benchmarks.race import contest, runs
from benchmarks.race.methods import DINO, METHODS, MinimalLeJEPA, nt_xent, vicreg
from conftest import Command, small_config
from torch import Tensor

from lejepa_scale.config import validate
from lejepa_scale.engine.optim import matrices
from lejepa_scale.errors import UserError
from lejepa_scale.model.lejepa import build

RESNET = {"encoder": "resnet10t", "options": {"channels": [8, 8, 16, 16], "stem_width": 8}}


def batch(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_simclr_is_equation_1() -> None:
    """Sample by sample: -log exp(sim(i, j) / t) / sum over k != i of exp(sim(i, k) / t), of both directions."""
    a, b, t = batch(5, 3), batch(5, 3, seed=1), 0.5
    z = [*a, *b]
    similar = [[float(x @ y / (x.norm() * y.norm())) / t for y in z] for x in z]
    losses = []
    for i in range(10):
        others = sum(math.exp(similar[i][k]) for k in range(10) if k != i)
        losses.append(-math.log(math.exp(similar[i][(i + 5) % 10]) / others))
    assert float(nt_xent(a, b, t)) == pytest.approx(sum(losses) / 10)


def test_vicreg_is_its_authors() -> None:
    """Variance by torch.std, covariance by torch.cov."""
    a, b = 0.5 * batch(40, 6), 2 * batch(40, 6, seed=1)
    expected = 25 * float(((a - b) ** 2).mean())
    for z in (a, b):
        expected += 25 * float(torch.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()) / 2
        covariance = torch.cov(z.T)
        expected += float((covariance - covariance.diag().diag()).square().sum()) / 6
    assert float(vicreg(a, b)) == pytest.approx(expected)


def test_dino_is_algorithm_1(tmp_path: Path) -> None:
    """A cross-entropy of every view with the teacher on every other global view; then centre and teacher move."""
    method = DINO(validate(small_config(tmp_path, tmp_path, model=RESNET))).eval()
    views = [torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32), torch.randn(4, 3, 16, 16)]
    with torch.no_grad():
        told = [method.teacher(view) for view in views[:2]]
        said = [method.head(method.encoder(view)) for view in views]
        losses = [
            -((t / 0.04).softmax(1) * (s / 0.1).softmax(1).log()).sum(1).mean()
            for i, t in enumerate(told)
            for j, s in enumerate(said)
            if i != j
        ]
        assert len(losses) == 4
        torch.testing.assert_close(method.loss(views, 0, 0.0), torch.stack(losses).mean())
        torch.testing.assert_close(method.centre, 0.1 * torch.cat(told).mean(0))
        before = [p.clone() for p in method.teacher.parameters()]
        for parameter in method.encoder.parameters():
            parameter.add_(1.0)
        method.after(0.0)
        moved = next(method.teacher.parameters()) - before[0]
        torch.testing.assert_close(
            moved, torch.full_like(moved, 0.01)
        )  # the momentum is 0.99 at first, and 1 in the end
        before = next(method.teacher.parameters()).clone()
        method.after(1.0)
        torch.testing.assert_close(next(method.teacher.parameters()), before)


def test_the_minimal_recipe_has_the_published_numbers(tmp_path: Path) -> None:
    """MINIMAL.md: +lamb=0.02 +V=4 +proj_dim=16 +lr=2e-3 +bs=256; drop-in of `configs/vits8_imagenette.yaml`'s."""
    from lejepa_scale.config import load_config

    published = load_config(Path("vits8_imagenette"))
    method = MinimalLeJEPA(validate(small_config(tmp_path, tmp_path, model=RESNET)))
    assert method.batch == published.train.global_batch
    assert method.lambda_ == published.objective.lambda_
    assert method.directions == published.objective.sigreg.num_slices
    assert method.views().global_.count == published.data.views.global_.count
    assert method.views().global_.scale == published.data.views.global_.scale
    assert method.augment() == published.data.augment
    assert method.head[-1].out_features == published.model.projector.dim
    assert method.head[0].out_features == published.model.projector.hidden
    for key in ("lr", "final_lr_ratio", "weight_decay", "decay", "betas", "eps", "clip_norm"):
        assert getattr(method.optim(), key) == getattr(published.optim, key), key


@pytest.mark.parametrize("encoder", ["resnet", "vit"])
def test_our_optimizer_is_the_recipes(tmp_path: Path, encoder: str) -> None:
    """The same matrices by Muon as in ours, all else by AdamW, no weight decay where ours has none; nothing left out."""
    model = RESNET if encoder == "resnet" else {}
    config = validate(small_config(tmp_path, tmp_path, model=model, optim={"name": "muon", "muon": {"lr_ratio": 0.5}}))
    method, ours = METHODS["simclr, our optimizer"](config), build(config)
    adamw, muon = runs._optimizers(method, config.optim)
    shapes = [sorted(p.shape for group in each.param_groups for p in group["params"]) for each in (adamw, muon)]
    assert shapes[1] == sorted(p.shape for p in matrices(ours).values())
    assert sorted(shapes[0] + shapes[1]) == sorted(p.shape for p in method.parameters())
    assert {group["lr_scale"] for group in muon.param_groups} == {0.5}
    assert all(p.ndim > 1 for group in adamw.param_groups if group["decayed"] for p in group["params"])


def test_our_optimizer_has_the_recipes_schedule(scenes: Path) -> None:
    recipe = Path("configs/resnet10_cifar10.yaml")
    tasks = [runs.Task(name, recipe, (f"data.shards={scenes}",), 1) for name in ("simclr, our optimizer", "simclr")]
    ours, plain = (runs.settings_of(task, METHODS[task.name](task.config()), 400) for task in tasks)
    recipes = tasks[0].config().optim
    assert (ours.name, ours.schedule, ours.lr, ours.warmup_steps) == ("muon", "wsd", recipes.lr, 20)
    assert (plain.name, plain.schedule, plain.lr, plain.warmup_steps) == ("adamw", "cosine", recipes.lr, 20)


def rows(*scores: tuple[str, int, float]) -> dict[str, object]:
    return {
        "machine": {},
        "rates": {"ours": 2.0, "simclr": 1.0},
        "rows": [
            {
                "contestant": name, "minutes": 10, "seed": seed, "batch": 128, "steps": 8, "images": 1024, "cpu s": 60,
                "curve": [{"seconds": 75.0, "knn": 20.0}, {"seconds": 600.0, "knn": score - 5, "logistic": score}],
            }
            for name, seed, score in scores
        ],
    }  # fmt: skip


def test_the_table_has_means_and_ranges_best_first(tmp_path: Path) -> None:
    found = rows(("simclr", 0, 50.0), ("ours", 0, 60.0), ("ours", 1, 63.0))
    head, _, first, second = contest.as_table(found).splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")][:2] == ["minutes", "contestant"]
    assert "| ours | 256 | 1,024 | 56.5 (55.0 to 58.0) | 61.5 (60.0 to 63.0) | 2 | 1 |" in first
    assert "| simclr | 128 | 1,024 | 45.0 | 50.0 | 1 | 1 |" in second
    pytest.importorskip("matplotlib")
    contest.picture(found, tmp_path / "race.svg")
    assert "simclr" in (tmp_path / "race.svg").read_text()


def test_points_of_a_run() -> None:
    assert runs.points(80) == [10, 20, 40, 80]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_race_runs_and_goes_on(command: Command, scenes: Path, tmp_path: Path) -> None:
    """Every contestant at toy size; a second call adds nothing but what is new."""
    tree = small_config(tmp_path, scenes, model=RESNET)
    out = tmp_path / "race.json"
    words = ["race", "--config", command.config(tree), "--train", scenes, "--test", scenes, "--smoke", "--json", out]
    result = command("tools/bench.py", *words, "--contestants", "ours", "simclr", timeout=900)
    assert result.returncode == 0, result.stderr
    first = json.loads(out.read_text())
    assert [row["contestant"] for row in first["rows"]] == ["ours", "simclr"]
    result = command("tools/bench.py", *words, timeout=900)
    assert result.returncode == 0, result.stderr
    second = json.loads(out.read_text())
    assert second["rows"][:2] == first["rows"]
    assert {row["contestant"] for row in second["rows"]} == {"ours", *METHODS}
    assert all(0 <= row["curve"][-1]["logistic"] <= 100 for row in second["rows"])
    assert all(name in result.stdout for name in METHODS)


def test_a_file_of_another_race_is_refused(tmp_path: Path) -> None:
    """Rows of another encoder, other images or another recipe would stand beside one another as if they were of one race."""
    recipe, out = Path("resnet10_cifar10"), tmp_path / "race.json"

    def race(*overrides: str, test: str = "b", label: str = "ours") -> None:
        contest.run(contest.Race(recipe, overrides, "a", test, 1, (), (), 1, label), out)

    race()
    race()
    race("optim.lr=1e-3", label="slower")
    with pytest.raises(UserError, match=r"overrides \[\], not \['optim\.lr=1e-3'\]: give it another --label"):
        race("optim.lr=1e-3")
    with pytest.raises(UserError, match="test 'b', not 'c': give another --json file"):
        race(test="c")
    with pytest.raises(UserError, match=r"sizes \[32\], not \[48\]: give another --json file"):
        race("data.views.global.size=48", label="larger")


def test_an_unknown_contestant_is_refused(tmp_path: Path) -> None:
    race = contest.Race(tmp_path, (), "", "", 1, (0,), ("byol",), 1)
    with pytest.raises(UserError, match="byol is none of the contestants: ours, minimal"):
        contest.run(race, None)
