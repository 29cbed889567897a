"""Averaged weights: those of torch's own AveragedModel, cut as the engine cuts them, saved, resumed, evaluated, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_config
from ranks import run_ranks
from safetensors import safe_open
from saving import Holder, exported, values
from steps import start, take_step
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_swa_avg_fn

from lejepa_scale.checkpoint import Progress, Saved, Saver, Store, gather, load_encoder
from lejepa_scale.cli.main import main
from lejepa_scale.config import Config, validate
from lejepa_scale.conversion import compare, open_model
from lejepa_scale.engine import Average
from lejepa_scale.engine.base import AVERAGE, VALUE
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation import Options, evaluate
from lejepa_scale.parallel import process_group
from lejepa_scale.training import loop

# -- the numbers


class _Walk(nn.Module):
    """Two parameters and two buffers on a walk of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(3))
        self.register_buffer("running", torch.randn(3))
        self.register_buffer("count", torch.tensor(0))

    def go(self) -> None:
        for tensor in self.state_dict().values():
            tensor.add_(torch.randn(()) if tensor.is_floating_point() else 1)

    def held(self) -> Holder:
        return Holder({VALUE: dict(self.named_parameters())}, buffers=dict(self.named_buffers()), updates=0)


def _young(decay: float, every: int) -> Any:
    """An exponential average whose decay grows with its age, as tf.train.ExponentialMovingAverage(num_updates=n) has it."""

    def average(held: Tensor, value: Tensor, number: Tensor) -> Tensor:
        n = int(number) * every
        keep = min(decay, (1 + n) / (10 + n)) ** every
        return keep * held + (1 - keep) * value

    return average


@pytest.mark.parametrize(
    ("kind", "decay", "every", "theirs"),
    [
        ("swa", 0.9, 1, get_swa_avg_fn()),
        ("swa", 0.9, 3, get_swa_avg_fn()),
        ("ema", 0.09, 1, get_ema_avg_fn(0.09)),  # (1 + n) / (10 + n) is never less
        ("ema", 0.09, 2, get_ema_avg_fn(0.09**2)),
        ("ema", 0.9, 1, _young(0.9, 1)),  # of age from the 80th step on
        ("ema", 0.9999, 4, _young(0.9999, 4)),
    ],
)
def test_the_average_is_that_of_torch(kind: Any, decay: float, every: int, theirs: Any) -> None:
    torch.manual_seed(0)
    walk = _Walk().double()
    ours, reference = Average(walk.held(), kind, decay, every), AveragedModel(walk, avg_fn=theirs, use_buffers=True)
    for _ in range(120):
        walk.go()
        ours.update()
        reference.update_parameters(walk)
    expected = dict(reference.module.named_parameters())
    for shard in ours.shards():
        torch.testing.assert_close(shard.data, expected[shard.name].detach().reshape(-1), rtol=1e-12, atol=1e-12)
        assert not shard.data.requires_grad
    torch.testing.assert_close(
        ours.buffers()["running"], reference.module.get_buffer("running"), rtol=1e-12, atol=1e-12
    )
    assert ours.buffers()["count"] == walk.get_buffer("count") == 120


def test_a_young_exponential_average_has_forgotten_where_it_began() -> None:
    """With a plain decay of 0.9999, 90 % of the average were still the random weights after 1000 steps."""
    value = torch.ones(1)
    holder = Holder({VALUE: {"a": value}}, updates=0)
    average = Average(holder, "ema", 0.9999, 10)
    average.update()
    value.zero_()
    for _ in range(100):
        average.update()
    assert next(average.shards()).data < 1e-6


def test_before_the_first_update_there_is_no_average(tmp_path: Path) -> None:
    holder = Holder(values(1.0), buffers={"running": torch.ones(2)})
    average = Average(holder, "ema")
    assert list(average.shards()) == []
    saver = Saver(Store(tmp_path, 2), holder, average)
    saver.begin(Progress(1, "shards"), {}, "run: {}\n")
    saved = Saved(saver.finish() or tmp_path)
    assert not saved.averaged
    assert saved.progress.averaged == 0
    assert "average.safetensors" not in (saved.files or {})


def test_what_is_saved_is_the_average_of_the_moment(tmp_path: Path) -> None:
    """A save in the background is not touched by the updates that follow; the file has the names of model.safetensors."""
    holder = Holder(values(1.0), buffers={"running": torch.ones(2)})
    average = Average(holder, "swa")
    average.update()
    saver = Saver(Store(tmp_path, 2), holder, average)
    saver.begin(Progress(1, "shards"), {}, "run: {}\n")
    for tensor in holder.values[VALUE].values():
        tensor.add_(10)
    average.update()
    saved = Saved(saver.finish() or tmp_path)
    assert (saved.averaged, saved.progress.averaged) == (True, 1)
    assert torch.equal(saved.whole("a.weight", AVERAGE), values(1.0)[VALUE]["a.weight"])
    assert torch.equal(saved.whole("running", AVERAGE), torch.ones(2))
    with (
        safe_open(saved.path / "average.safetensors", "pt") as ours,
        safe_open(saved.path / "model.safetensors", "pt") as model,
    ):
        assert sorted(ours.keys()) == sorted(model.keys())


# -- engines

WORLDS = [
    *(("fsdp", 2), ("zero3", 2), ("zero1", 2), ("ddp", 2), ("hsdp", 4)),
    *(pytest.param(name, 2, marks=pytest.mark.slow) for name in ("zero2", "fsdp offloaded", "zero3 offloaded")),
]
BATCH = 16


def _config(name: str) -> Config:
    engine: dict[str, Any] = {"name": name.split()[0]}
    if name == "hsdp":
        engine |= {"name": "fsdp", "shard_degree": 2}
    if "offloaded" in name:
        engine["cpu_offload"] = True
    model = {"options": {"depth": 2}, "projector": {"hidden": 65, "dim": 17}}
    return validate(small_config("unused", "unused", engine=engine, model=model, train={"global_batch": BATCH}))


def _trained(name: str, folder: str) -> Any:
    """Weights after every step, on rank 0; their averages are saved."""
    engine, plan = start(_config(name))
    average, along = Average(engine, "ema", 0.8), []
    rank = process_group.rank()
    for step in range(4):
        views = torch.randn(2, BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        take_step(engine, plan, [[views[:, rank * plan.micro_batch :][:, : plan.micro_batch]]], step)
        average.update()
        along.append(gather(engine))
    saver = Saver(Store(Path(folder), 9), engine, average)
    saver.begin(Progress(4, "shards"), {}, "run: {}\n")
    saver.finish()
    mine = sum(len(shard.data) for shard in average.shards())
    used = _used(engine, average, views[:, rank * plan.micro_batch :][:, : plan.micro_batch])
    engine.close()
    return along, mine, used


def _used(engine: Any, average: Average, views: Tensor) -> tuple[Any, Any, list[Tensor]]:
    """Weights while the average is in use, and afterwards, on rank 0; features before, meanwhile and afterwards."""
    features = []

    def encode() -> None:
        with engine.frozen():
            features.append(engine.encode([views]).clone())

    encode()
    with average.in_use():
        inside = gather(engine)
        encode()
    encode()
    return inside, gather(engine), features


@pytest.mark.parametrize(("name", "world"), WORLDS)
def test_every_engine_averages_its_own_shards(tmp_path: Path, name: str, world: int) -> None:
    found = run_ranks(_trained, world, name, str(tmp_path))
    along = found[0][0]
    saved = Saved(tmp_path / "checkpoints/step_00000004")
    total = sum(tensor.numel() for key, tensor in along[0].model.items() if key in saved.parameters)
    replicas = {"ddp": world, "hsdp": 2}.get(name, 1)
    assert sum(mine for _, mine, _ in found) == replicas * total  # nobody holds what is another's
    for key, (shape, _) in (saved.parameters | saved.buffers).items():
        expected = along[0].model[key].double()
        for n, state in enumerate(along[1:], 1):
            keep = min(0.8, (1 + n) / (10 + n))
            expected = keep * expected + (1 - keep) * state.model[key].double()
        if not along[0].model[key].is_floating_point():
            expected = along[-1].model[key].double()
        assert saved.whole(key, AVERAGE).shape == shape
        torch.testing.assert_close(
            saved.whole(key, AVERAGE).double(), expected, rtol=1e-6, atol=1e-7, msg=f"{name}: {key}"
        )
    inside, after, _ = found[0][2]
    for key, trained in along[-1].model.items():
        assert torch.equal(inside.model[key], saved.whole(key, AVERAGE)), key
        assert torch.equal(after.model[key], trained), key
    for _, _, (_, _, (before, averaged, again)) in found:
        assert torch.equal(before, again)
        assert not torch.allclose(before, averaged, rtol=1e-3)


# -- runs


def _run(folder: Path, scenes: Path, **sections: Any) -> Config:
    average = {"kind": "ema", "decay": 0.9, "every": 2, **sections.pop("average", {})}
    return validate(small_config(folder, scenes, average=average, **{"checkpoint": {"every": 4}, **sections}))


def _tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_a_resumed_average_is_that_of_the_uninterrupted_run(scenes: Path, tmp_path: Path, kind: str) -> None:
    """And the training is not touched by it, bit for bit."""
    settings: dict[str, Any] = {"kind": kind, "start": 0.0}
    if kind == "swa":
        settings["decay"] = 0.9999
    steps = {"steps": 10, "global_batch": 16}
    optim = {"final_lr_ratio": 1.0}
    loop.train(_run(tmp_path / "whole", scenes, average=settings, train=steps, optim=optim))
    for until in (7, 10):
        loop.train(_run(tmp_path / "parts", scenes, average=settings, train={**steps, "steps": until}, optim=optim))
    plain = small_config(tmp_path / "plain", scenes, train=steps, optim=optim)
    loop.train(validate(plain))
    last = "checkpoints/step_00000010"
    assert Saved(tmp_path / "whole" / last).progress.averaged == 5
    for file in ("average", "model", "optimizer"):
        whole, parts = (_tensors(tmp_path / run / last / f"{file}.safetensors") for run in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole), file
    trained, without = (_tensors(tmp_path / run / last / "model.safetensors") for run in ("whole", "plain"))
    assert all(torch.equal(trained[key], without[key]) for key in trained)
    averaged = _tensors(tmp_path / "whole" / last / "average.safetensors")
    assert not any(torch.equal(averaged[key], trained[key]) for key in trained if "blocks.0.attn.qkv.weight" in key)


def test_swa_begins_late(scenes: Path, tmp_path: Path) -> None:
    """Three quarters of the run are over before: of 16 steps those after 14 and 16 are averaged."""
    loop.train(
        _run(tmp_path, scenes, average={"kind": "swa", "decay": 0.9999}, train={"steps": 16, "global_batch": 16})
    )
    early, late = (Saved(tmp_path / f"checkpoints/step_{step:08d}") for step in (12, 16))
    assert (early.averaged, late.progress.averaged) == (False, 2)


def test_another_kind_begins_anew_and_none_gives_it_up(
    scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    loop.train(_run(tmp_path, scenes, train={"steps": 4, "global_batch": 16}))
    swa = {"kind": "swa", "decay": 0.9999, "start": 0.0}
    loop.train(_run(tmp_path, scenes, average=swa, train={"steps": 6, "global_batch": 16}))
    assert "average.kind is swa, not ema as before: that average is given up." in caplog.text
    saved = Saved(tmp_path / "checkpoints/step_00000006")
    assert saved.progress.averaged == 1
    assert torch.equal(
        saved.whole("encoder.backbone.norm.weight", AVERAGE), saved.whole("encoder.backbone.norm.weight")
    )
    loop.train(validate(small_config(tmp_path, scenes, train={"steps": 8, "global_batch": 16})))
    assert not Saved(tmp_path / "checkpoints/step_00000008").averaged


def test_averaged_weights_are_evaluated_and_exported(scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    loop.train(_run(run, scenes, train={"steps": 8, "global_batch": 16}))
    saved = Saved(run / "checkpoints/step_00000008")
    name = "blocks.0.attn.qkv.weight"
    of = {
        weights: load_encoder(run, weights=weights)[0].backbone.state_dict()[name]
        for weights in ("best", "trained", "average")
    }
    assert torch.equal(of["average"], saved.whole(f"encoder.backbone.{name}", AVERAGE))
    assert torch.equal(of["best"], of["average"])
    assert torch.equal(of["trained"], saved.whole(f"encoder.backbone.{name}"))
    found = evaluate(run, str(scenes), str(scenes), options=Options(("knn",)))
    rows = list(dict.fromkeys(row.subject for row in found.results))
    assert rows == ["averaged", "trained", "untrained", "raw pixels"]
    for options, expected in (([], "average"), (["--weights", "trained"], "trained")):
        target = tmp_path / f"{expected}.safetensors"
        assert main(["convert", str(run), str(target), "--to", "safetensors", "--verify", *options]) == 0
        assert torch.equal(_tensors(target)[name], of[expected])
    assert exported(run, tmp_path / "first.safetensors", weights="first")
    model = open_model(str(run), "average")
    with pytest.raises(UserError, match="DIFFERS"):
        compare(model, tmp_path / "first.safetensors", "safetensors", exact=True, dtype=torch.float32)


def test_an_average_that_was_not_kept_is_refused(scenes: Path, tmp_path: Path) -> None:
    loop.train(validate(small_config(tmp_path, scenes, train={"steps": 1, "global_batch": 16})))
    with pytest.raises(UserError, match=r"step_00000001 holds no averaged weights: .*average\.kind=ema"):
        load_encoder(tmp_path, weights="average")


def test_a_run_begins_from_the_average_of_another(
    scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    loop.train(_run(tmp_path / "a", scenes, train={"steps": 4, "global_batch": 16}))
    model = small_config("r", "s")["model"] | {"init_from": str(tmp_path / "a")}
    loop.train(validate(small_config(tmp_path / "b", scenes, model=model, train={"steps": 1, "global_batch": 16})))
    assert "(averaged weights)" in caplog.text
    first = load_encoder(tmp_path / "b", weights="first")[0].backbone.state_dict()
    averaged = load_encoder(tmp_path / "a", weights="average")[0].backbone.state_dict()
    assert all(torch.equal(first[key], averaged[key]) for key in averaged)
