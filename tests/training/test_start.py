"""A start does things once: how often a module is built and an encoder run, and who words the summary."""

from __future__ import annotations

import logging
import re
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import small_config
from ranks import run_ranks

from lejepa_scale.checkpoint.metrics import read_metrics
from lejepa_scale.config import check_world, validate
from lejepa_scale.data import open_mixture
from lejepa_scale.errors import UserError
from lejepa_scale.model import Encoder, check
from lejepa_scale.parallel import process_group
from lejepa_scale.training import loop, summary
from lejepa_scale.training.schedule import learning_rate
from lejepa_scale.training.start import start_engine


def _counted(engine: str, shards: Path, run: Path) -> Counter[str]:
    """What this rank does until the first step begins."""
    counts: Counter[str] = Counter()

    def build(self: Encoder, *arguments: Any, init: Any = Encoder.__init__, **more: Any) -> None:
        init(self, *arguments, **more)
        empty = {p.is_meta or not p.numel() for p in self.parameters()}  # ZeRO-3 empties what it has cut
        counts["without memory" if True in empty else "with weights"] += 1

    def forward(self: Encoder, images: Any, run: Any = Encoder.forward) -> Any:
        counts["encoder runs"] += 1
        return run(self, images)

    class Words(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "M parameters" in record.getMessage():
                counts["summaries"] += 1

    logging.getLogger("lejepa_scale").addHandler(Words())
    logging.getLogger("lejepa_scale").setLevel(logging.INFO)
    Encoder.__init__, Encoder.forward = build, forward  # type: ignore[method-assign]
    loop.loop = lambda run, actions, phases, begins: None
    process_group.joined = lambda timeout: nullcontext(torch.device("cpu"))  # type: ignore[assignment]
    loop.train(validate(small_config(run, shards, engine={"name": engine}, checkpoint={"every": 1000})))
    return counts


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_a_start_builds_and_checks_once(engine: str, scenes: Path, tmp_path: Path) -> None:
    """On every rank one module for the check, which alone runs the encoder, once for all sizes, and one for the engine
    (under ZeRO another for its buffers); the weights are drawn by the first rank."""
    first, second = run_ranks(_counted, 2, engine, scenes, tmp_path / "run")
    empty = {"fsdp": 2, "zero3": 3}[engine]
    assert second == {"without memory": empty, "encoder runs": 1}
    assert first == {"without memory": empty, "with weights": 1, "encoder runs": 1, "summaries": 1}


def _infinite() -> str:
    def create(*arguments: Any, own: Any = timm.create_model, **more: Any) -> Any:
        made = own(*arguments, **more)
        made.register_buffer("least", torch.tensor(-torch.inf))
        return made

    timm.create_model = create
    config = validate(small_config("u", "u", engine={"name": "ddp"}))
    with pytest.raises(UserError) as refused:
        start_engine(config, check_world(config, 2), torch.device("cpu"))
    return str(refused.value)


def test_a_model_that_begins_with_infinities_is_refused_on_every_rank() -> None:
    """As Gemma's encoders do, whose buffers are bounds: else their first checkpoint would be refused."""
    first, second = run_ranks(_infinite, 2)
    assert first == second
    assert (
        "model.encoder=vit_nano begins with values that are no numbers (1 of 1 values of encoder.backbone.least"
        in first
    )


def test_the_summary_says_what_there_is(scenes: Path, tmp_path: Path) -> None:
    config = validate(
        small_config(tmp_path, scenes, train={"global_batch": 16, "micro_batch": 2}, engine={"name": "fsdp"})
    )
    plan, shapes = check_world(config, 4), check(config)
    text = summary.summary(config, plan, open_mixture(config.data), shapes, torch.device("cpu"), 3)
    parameters = sum(p.numel() for p in shapes.parameters()) / 1e6
    assert f"vit_nano: {parameters:.1f} M parameters (with projector), fsdp fp32 on 4 x cpu" in text
    assert "batch 16 = 2 x 4 ranks x 2; 96 images in 3 shards; steps 3 to 4." in text
    assert "tokens of 8 views in a row" in text  # 2 images, 2 + 2 views
    assert "warm-up" not in text
    counts = re.search(r"Weight decay 0.05 on (\d+) tensors \(([\d,]+) p.*none on (\d+) tensors \(([\d,]+) p", text)
    assert counts is not None
    tensors, decayed, others, rest = (int(count.replace(",", "")) for count in counts.groups())
    assert tensors + others == len(list(shapes.parameters()))
    assert decayed + rest == sum(p.numel() for p in shapes.parameters())
    matrices = [p for p in shapes.parameters() if p.ndim >= 2 and p.shape[0] > 1]  # tokens and positions begin with 1
    assert (tensors, decayed) == (len(matrices), sum(p.numel() for p in matrices))
    assert "micro-batches of 8 images, not of all 16; objective.accumulation=exact" in text


def test_a_run_that_ends_inside_its_warmup_says_so(tmp_path: Path) -> None:
    """A recipe cut short to try it out: the rate that is reached is that of its last step."""
    config = validate(small_config(tmp_path, "s", train={"steps": 20}, optim={"warmup_steps": 60, "lr": 0.3}))
    assert learning_rate(19, 20, config.optim) == pytest.approx(0.1)
    assert "reaches 0.1, not optim.lr = 0.3" in summary._warmup_notice(config)
    rates = {"warmup_steps": 60, "lr": 0.3, "warmup_start_ratio": 0.5}
    config = validate(small_config(tmp_path, "s", train={"steps": 20}, optim=rates))
    assert "reaches 0.197, not optim.lr = 0.3" in summary._warmup_notice(config)  # 0.3 (0.5 + 0.5 * 19 / 60)


def notices(tmp_path: Path, ranks: int, **sections: Any) -> str:
    config = validate(small_config(tmp_path, "s", **sections))
    return summary._small_sample_notice(config, check_world(config, ranks))


def test_few_images_at_once_are_pointed_out_with_what_helps(tmp_path: Path) -> None:
    few = {"global_batch": 16, "micro_batch": 2}
    said = notices(tmp_path, 2, train=few, engine={"name": "ddp"})
    assert "SIGReg sees 4 embeddings at once" in said
    assert "standard deviation of 0.74, not 1" in said
    for advice in (
        {"objective": {"sigreg": {"estimator": "u"}}},
        {"train": {"global_batch": 64, "micro_batch": 16}},
        {"train": {"global_batch": 32, "micro_batch": 2}, "objective": {"accumulation": "exact"}},
    ):
        assert not notices(tmp_path, 2, **{"train": few, "engine": {"name": "ddp"}, **advice})
    for other in ("weak_sigreg", "visreg"):
        assert not notices(tmp_path, 2, train=few, engine={"name": "ddp"}, objective={"regularizer": other})
    assert "sees 16 embeddings" in notices(tmp_path, 2, train=few, engine={"name": "ddp"}, objective={"joint": True})


def test_one_image_at_a_time_is_refused(tmp_path: Path) -> None:
    one = {"global_batch": 4, "micro_batch": 1}
    for objective in (
        {},
        {"sigreg": {"estimator": "u"}},
        {"joint": True},
        {"accumulation": "unbiased", "sigreg": {"estimator": "u"}},
    ):
        config = validate(small_config(tmp_path, "s", train=one, objective=objective))
        with pytest.raises(UserError, match=r"see 1 image at a time: train.micro_batch = 1 on 1 rank"):
            check_world(config, 1)
    assert check_world(validate(small_config(tmp_path, "s", train=one, engine={"name": "ddp"})), 2).accumulation == 2
    exact = validate(small_config(tmp_path, "s", train=one, objective={"accumulation": "exact"}))
    assert check_world(exact, 1).accumulation == 4


def test_a_wsd_run_is_made_longer_from_a_checkpoint_before_its_cooldown(
    scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As the start of the run advises: the longer run goes on as if it had been so long from the start."""
    caplog.set_level(logging.INFO)
    optim = {"schedule": "wsd", "warmup_steps": 2, "cooldown_steps": 2}
    kept = {"every": 2, "keep_every": 4, "keep": 1}
    settings: dict[str, Any] = {"optim": optim, "checkpoint": kept}
    loop.train(validate(small_config(tmp_path / "short", scenes, train={"steps": 6}, **settings)))
    assert "falls from step 4 on (optim.schedule=wsd)" in caplog.text
    loop.train(validate(small_config(tmp_path / "whole", scenes, train={"steps": 8}, **settings)))
    tree = small_config(tmp_path / "longer", scenes, train={"steps": 8}, **settings)
    tree["run"]["resume"] = str(tmp_path / "short/checkpoints/step_00000004")
    loop.train(validate(tree))
    whole, longer = (
        {r["step"]: (r["loss"], r["lr"]) for r in read_metrics(tmp_path / name / "metrics.jsonl")}
        for name in ("whole", "longer")
    )
    assert longer == {step: whole[step] for step in range(5, 9)}
