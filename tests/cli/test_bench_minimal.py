"""The minimal recipe that the quickstart's step is measured against: that it is LeJEPA, and that the race reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks import against_minimal, minimal
from conftest import Command, small_config
from ranks import run_ranks
from torch import Tensor, nn

from lejepa_scale.config import Config, validate
from lejepa_scale.model import build

RESNET = {"encoder": "resnet10t", "options": {"channels": [8, 8, 16, 16], "stem_width": 8}}


def both(config: Config, views: list[Tensor]) -> list[tuple[Tensor, list[Tensor]]]:
    """Loss and gradients of ours and of the recipe, at the same weights and directions, in float64."""
    torch.manual_seed(0)
    ours, theirs = build(config).double(), minimal.Network(config).double()
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            other.copy_(mine)
    objective = config.objective
    a = ours.loss.regularizer.directions(0, config.model.projector.dim, torch.device("cpu"), torch.float64).T
    losses = [
        ours(views, 0)["loss"],
        minimal.lejepa(
            theirs([view for group in views for view in group]),
            len(views[0]), objective.lambda_, a, objective.sigreg.t_max, objective.sigreg.knots,
        ),
    ]  # fmt: skip
    found = []
    for loss, module in zip(losses, (ours, theirs), strict=True):
        loss.backward()
        found.append((loss.detach(), gradients(module)))
    return found


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]


def test_the_recipe_is_lejepa(tmp_path: Path) -> None:
    """Without batch normalization a sample's embedding depends on no other: one packed forward and one per view agree."""
    config = validate(small_config(tmp_path, tmp_path, model={"projector": {"layers": 1, "dim": 17}}))
    views = [
        torch.randn(g.count, 6, 3, g.size, g.size).double()
        for g in (config.data.views.global_, config.data.views.local)
    ]
    (loss, ours), (expected, theirs) = both(config, views)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours, theirs)


def test_the_recipe_is_lejepa_with_batch_normalization(tmp_path: Path) -> None:
    """Ours normalizes over all views, the recipe over each: the same where the views are the same images."""
    tree = small_config(tmp_path, tmp_path, model=RESNET)
    tree["data"]["views"]["local"]["count"] = 0
    config = validate(tree)
    view = torch.randn(1, 6, 3, 32, 32).double()
    (loss, ours), (expected, theirs) = both(config, [view.expand(2, -1, -1, -1, -1)])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours, theirs)


def _half(whole: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    from lejepa_scale.parallel import process_group

    z = whole.chunk(2)[process_group.rank()].clone().requires_grad_()
    loss = minimal.sigreg(z, a, 3.0, 17, ranks=2)
    loss.backward()
    return loss.detach(), z.grad


def test_its_sigreg_is_of_all_ranks() -> None:
    """The value is that of all samples; gradients are W times theirs, which DDP divides by W."""
    whole, a = torch.randn(10, 4, dtype=torch.float64), minimal.directions(0, 4, 8).double()
    z = whole.clone().requires_grad_()
    loss = minimal.sigreg(z, a, 3.0, 17)
    loss.backward()
    (first, upper), (second, lower) = run_ranks(_half, 2, whole, a)
    torch.testing.assert_close([first, second], [loss.detach()] * 2)
    torch.testing.assert_close(torch.cat([upper, lower]) / 2, z.grad)


DRIVER = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, "tools")
from benchmarks import against_minimal

against_minimal._WARM = 1

if __name__ == "__main__":
    rows = list(against_minimal.against(Path(sys.argv[1]), ["train.global_batch=16"], rounds=1, steps=1, target=None))
    if os.environ["RANK"] == "0":
        Path(sys.argv[2]).write_text(json.dumps(rows))
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_race_reports(command: Command, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks at toy size: every arrangement of the recipe is tried; the best in one process and the best on two ranks
    meet ours. Rates are not checked."""
    tree = small_config(tmp_path, scenes, model=RESNET, engine={"name": "fsdp", "precision": "fp32"})
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # threads that spin for each other starve on a busy machine
    driver, out = tmp_path / "driver.py", tmp_path / "rows.json"
    driver.write_text(DRIVER)
    result = command(driver, command.config(tree), out, ranks=2, timeout=900)
    assert result.returncode == 0, result.stderr
    *tried, ours, published, on_ranks, race, other = json.loads(out.read_text())
    assert len(tried) == len(against_minimal.arrangements(against_minimal.cores(), 2))
    assert all(row["images/s"] > 0 for row in tried)
    for row, kind in ((race, "one process"), (other, "DDP")):
        fitting = [t for t in tried if kind in t["case"]]
        assert row["case"].endswith(max(fitting, key=lambda t: t["images/s"])["case"].partition(": ")[2])
        assert row["ours / minimal"] == pytest.approx(row["ours images/s"] / row["minimal images/s"])
        assert "ok" not in row
    assert {"forward ms", "backward ms", "update ms"} <= published.keys() & on_ranks.keys()
    assert {"data wait ms", "forward ms", "backward ms", "optimizer ms"} <= ours.keys()
    assert "colours ms" in ours
