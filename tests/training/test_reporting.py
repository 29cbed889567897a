"""What a run reports: kept means, lines of metrics.jsonl, a probe that survives a bad step."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from conftest import small_config

from lejepa_scale.config import validate
from lejepa_scale.training.probe import OnlineProbe
from lejepa_scale.training.reporting import Means, Reporter


def test_means_start_again_after_each_read() -> None:
    means = Means()
    yes, no = torch.tensor(True), torch.tensor(False)
    means.add(yes, a=torch.tensor(1.0), b=torch.tensor(5.0))
    means.add(yes, a=torch.tensor(2.0))
    means.add(no, a=torch.tensor(math.nan), b=torch.tensor(7.0))
    assert means.take() == {"a": torch.tensor(1.5), "b": torch.tensor(5.0)}
    assert means.take() == {}


def test_a_resumed_run_forgets_the_lines_it_takes_again(tmp_path: Path) -> None:
    config = validate(small_config(tmp_path, "s"))
    reporter = Reporter(config, 0, active=True)
    for step in (1, 2, 3):
        reporter.log({"step": step, "loss": math.nan if step == 2 else 0.5})
    reporter.close()
    Reporter(config, 2, active=True).close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]


def test_the_state_of_the_probe_is_a_copy_and_comes_back() -> None:
    probe = OnlineProbe(4, 3, 1e-2, 0, torch.device("cpu"))
    features, labels = torch.randn(8, 4), torch.arange(8) % 3
    finite = torch.tensor(True)
    probe.step(features, labels, finite)
    before = probe.state_dict()
    probe.step(features, labels, finite)
    assert not torch.equal(before["head.1.weight"], probe.state_dict()["head.1.weight"])
    other = OnlineProbe(4, 3, 1e-2, 1, torch.device("cpu"))
    other.load_state_dict(before)
    assert all(torch.equal(other.state_dict()[k], before[k]) for k in before)
