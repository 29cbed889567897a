"""Muon: the orthogonal factor against a singular value decomposition and the iteration in float64, the update against
torch's own optimizer and a formula, every engine that can hold it against one process, saved states to the bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import mostly_slow, small_config
from ranks import run_ranks
from steps import of_this_rank, start, take_step
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode
from truth import formulas

from lejepa_scale.checkpoint import CanonicalState, Progress, Saved, Saver, Store, gather
from lejepa_scale.config import Config, validate
from lejepa_scale.engine import muon as module
from lejepa_scale.engine.muon import MOMENTUM, Muon, orthogonal
from lejepa_scale.engine.optim import expect_matrices, leave_out, matrices
from lejepa_scale.errors import UserError
from lejepa_scale.model import build

STEPS = 3
SHAPES = [(384, 128), (128, 384), (64, 64), (130, 65)]
CONVOLUTIONS = [(64, 16, 3, 3), (64, 48, 1, 1), (8, 5, 2)]
RESNET = {"encoder": "resnet10t", "options": {"channels": [6, 8, 12, 16], "stem_width": 8}}


def config_of(
    engine: str = "single", precision: str = "fp32", model: dict[str, Any] | None = None, **optim: Any
) -> Config:
    section: dict[str, Any] = {"name": engine, "precision": precision}
    if engine == "hsdp":
        section |= {"name": "fsdp", "shard_degree": 2}
    optim = {"name": "muon", "eps": 1e-4, "layer_decay": 0.5, **optim}
    return validate(small_config("unused", "unused", engine=section, optim=optim, model=model or {}))


def views_of(step: int) -> list[torch.Tensor]:
    return [torch.randn(2, 16, 3, 32, 32, generator=torch.Generator().manual_seed(step))]


def train(
    config: Config, first: int = 0, steps: int = STEPS, **given: Any
) -> tuple[list[float], CanonicalState | None]:
    engine, plan = start(config, **given)
    losses = []
    for step in range(first, first + steps):
        result = take_step(engine, plan, of_this_rank(views_of(step), plan), step, lr=0.01, weight_decay=0.1)
        losses.append(float(result.loss))
    state = gather(engine)
    engine.close()
    return losses, state


@pytest.mark.parametrize("shape", [*SHAPES, (32, 288)])
def test_the_orthogonal_factor(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Singular vectors of the matrix with values of 0.68 to 1.14 in place of its own, which lie within a factor of 20; the
    iteration in float64 to the rounding of bf16, and in fp32 to that of fp32."""
    generator = np.random.default_rng(0)
    u, _, v = np.linalg.svd(generator.standard_normal(shape), full_matrices=False)
    values = np.geomspace(1, 0.05, min(shape))
    matrix = (u * values) @ v
    exact = formulas.newton_schulz(matrix)
    with monkeypatch.context() as gpu:
        gpu.setattr(module, "_ON_CPU", torch.bfloat16)
        found = orthogonal(torch.from_numpy(matrix).float())
    assert found.dtype == torch.bfloat16
    assert np.linalg.norm(found.double().numpy() - exact) < 0.03 * np.linalg.norm(exact)
    fine = orthogonal(torch.from_numpy(matrix).float()).double().numpy()
    np.testing.assert_allclose(fine, exact, rtol=0, atol=1e-4 * np.abs(exact).max())
    among = u.T @ fine @ v.T
    assert np.abs(among - np.diag(np.diag(among))).max() < 1e-3
    assert 0.68 < np.diag(among).min() <= np.diag(among).max() < 1.14
    polar = u @ v  # scipy.linalg.polar's
    assert np.linalg.norm(fine - polar) < 0.25 * np.linalg.norm(polar)


@pytest.mark.parametrize("shape", [(96, 864), (864, 96)])
def test_the_gram_matrix_has_room_for_small_singular_values(shape: tuple[int, int]) -> None:
    """Of a long matrix, whose values lie within a factor of 1e6, or whose rows are mostly the same, or none: as the
    iteration in float64, to half a percent of the largest value."""
    generator = np.random.default_rng(0)
    u, _, v = np.linalg.svd(generator.standard_normal(shape), full_matrices=False)
    apart = (u * np.geomspace(1, 1e-6, min(shape))) @ v
    alike = (u * np.array([1] * 3 + [0] * 93)) @ v
    for matrix in (apart, alike):
        found = orthogonal(torch.from_numpy(matrix).float()).double().numpy()
        assert np.linalg.norm(found - formulas.newton_schulz(matrix), 2) < 5e-3
    assert not orthogonal(torch.zeros(shape)).any()


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_steps_are_torchs_to_the_bit(
    adjust: Literal["match_rms_adamw", "original"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In torch's precision, bf16; and one in the middle that is left out is not there. Torch has the convolutions as
    matrices."""
    monkeypatch.setattr(module, "_ON_CPU", torch.bfloat16)
    start = [torch.randn(s, generator=torch.Generator().manual_seed(1)) for s in SHAPES + CONVOLUTIONS]
    ours, theirs = [nn.Parameter(x.clone()) for x in start], [nn.Parameter(x.flatten(1).clone()) for x in start]
    own = Muon([{"params": ours}], lr=0.02, weight_decay=0.3, momentum=0.9, adjust_lr=adjust)
    plain = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.3, momentum=0.9, adjust_lr_fn=adjust)
    generator = torch.Generator().manual_seed(2)
    for step in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.flatten(1).clone()
            if step == 2:
                a.grad[0, 0] = torch.nan
        leave_out(own, torch.tensor(step == 2))
        own.step()
        if step != 2:
            plain.step()
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a.flatten(1), b), step
            assert torch.equal(own.state[a][MOMENTUM].flatten(1), plain.state[b]["momentum_buffer"])
    with pytest.raises(ValueError, match=r"not a parameter of shape \(3,\)"):
        Muon([{"params": [nn.Parameter(torch.zeros(3))]}], lr=1.0)


def test_an_update_has_adamws_size() -> None:
    """Root mean square of 0.2, as arXiv 2502.16982 (section 2.2) finds for AdamW's, for matrices of any sides."""
    for shape in SHAPES + CONVOLUTIONS:
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = torch.randn(shape)
        Muon([{"params": [weight]}], lr=1.0).step()
        assert 0.15 < float(weight.detach().square().mean().sqrt()) < 0.22


def test_matrices_of_blocks_are_muons_and_all_else_is_adamws() -> None:
    model = {"encoder": "vit_small_patch14_reg4_dinov2", "patch_size": 16, "head_dim": 8, "predictor": {"hidden": 9}}
    options = {"depth": 1, "embed_dim": 48, "num_heads": 3}
    lejepa = build(validate(small_config("u", "u", model={**model, "options": options})))
    inside = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert set(matrices(lejepa)) == {f"encoder.backbone.blocks.0.{name}.weight" for name in inside}


@pytest.mark.parametrize(
    ("encoder", "stem", "others"),
    [
        ("resnet10t", "conv1.0.weight", set()),
        ("convnext_atto", "stem.0.weight", {"conv_dw.weight"}),
        (
            "efficientnet_lite0",
            "conv_stem.weight",
            {"conv_dw.weight", "conv_head.weight"},
        ),  # the latter after its blocks
        ("swin_tiny_patch4_window7_224", "patch_embed.proj.weight", set()),
    ],
)
def test_convolutions_are_muons_but_for_the_one_that_reads_the_image_and_grouped_ones(
    encoder: str, stem: str, others: set[str]
) -> None:
    """Of an encoder whose blocks are not known, all: by shape, a weight that is no bias, scale or table is one of these."""
    size = 224 if "224" in encoder else 64
    groups = {"global": {"count": 2, "size": size}, "local": {"count": 0}}
    tree = small_config("u", "u", model={"encoder": encoder, "options": {}}, data={"views": groups})
    with torch.device("meta"):
        lejepa = build(validate(tree))
    named = {name: p for name, p in lejepa.encoder.backbone.named_parameters() if p.ndim > 1 and "table" not in name}
    excepted = {name for name in named if name == stem or any(name.endswith(end) for end in others)}
    assert {name.removeprefix("encoder.backbone.") for name in matrices(lejepa)} == {*named} - excepted


def test_an_encoder_without_such_matrices_is_refused() -> None:
    lejepa = build(validate(small_config("u", "u", optim={"name": "muon"})))
    for name in matrices(lejepa):
        lejepa.get_parameter(name).requires_grad_(False)
    with pytest.raises(UserError, match=r"optim\.name=muon .* vit_nano has none .*Use optim\.name=adamw"):
        expect_matrices(lejepa)


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_deepspeeds_engines_refuse_it(engine: str) -> None:
    with pytest.raises(UserError, match=rf"optim\.name=muon .* engine\.name={engine} .* Use engine\.name=fsdp"):
        config_of(engine)


@pytest.mark.parametrize(("adjust", "model"), [("match_rms_adamw", {}), ("original", {}), ("match_rms_adamw", RESNET)])
def test_updates_of_an_engine_are_the_formulas(adjust: str, model: dict[str, Any]) -> None:
    """Each with the rate that its layer has, and clipped by the norm of all."""
    settings = {"momentum": 0.8, "adjust_lr": adjust, "lr_ratio": 3.0}
    decay = {"layer_decay": None} if model else {}
    engine, _ = start(config_of(model=model, muon=settings, clip_norm=0.5, betas=[0.9, 0.95], **decay))
    before = {n: p.detach().double().numpy().copy() for n, p in engine.module.named_parameters()}
    gradients = []
    for step in range(STEPS):
        engine.backward(engine.forward(views_of(step), step)["loss"], True)
        found = {n: p.grad.double().numpy().copy() for n, p in engine.module.named_parameters()}
        norm = np.sqrt(sum((g**2).sum() for g in found.values()))
        assert norm > 0.5
        gradients.append({n: g * 0.5 / norm for n, g in found.items()})
        engine.step(0.01, 0.2)
    own = set(matrices(engine.module))
    for name, parameter in engine.module.named_parameters():
        layer = 2 - int(name.split(".")[3]) if "blocks." in name else 1 if "norm" in name else 3
        lr = 0.01 * (0.5**layer if name.startswith("encoder.") and not model else 1.0)
        mine, weight = [g[name] for g in gradients], before[name]
        if name in own:
            weight, mine = weight.reshape(len(weight), -1), [g.reshape(len(weight), -1) for g in mine]
            rows, columns = weight.shape
            factor = 0.2 * max(rows, columns) ** 0.5 if adjust == "match_rms_adamw" else max(1, rows / columns) ** 0.5
            given = {"momentum": 0.8, "weight_decay": 0.2, "factor": factor}
            expected = formulas.muon(weight, mine, lr=3 * lr, **given)
        else:
            decay = 0.2 if weight.ndim > 1 and "weight" in name else 0.0
            expected = formulas.adamw(weight, mine, lr=lr, betas=(0.9, 0.95), eps=1e-4, weight_decay=decay)
        moved = np.linalg.norm(expected - weight)
        found = parameter.detach().double().numpy().reshape(expected.shape)
        assert np.linalg.norm(found - expected) < 1e-3 * moved + 1e-6, name


def _of_engines(cases: list[tuple[str, str]], exact: bool) -> list[Any]:
    if not exact:
        module._ON_CPU = torch.bfloat16
    return [train(config_of(*case)) for case in cases]


@pytest.mark.parametrize("world", mostly_slow([2, 4], 2))
def test_ranks_are_one_process(world: int) -> None:
    """Iterated in fp32, to its rounding: in bf16 a last bit of a gradient is a thousandth of a direction's element."""
    cases = [("ddp", "fp32"), ("hsdp" if world == 4 else "fsdp", "fp32")]
    losses, one = train(config_of())
    assert one is not None
    assert one.moments.keys() == {"exp_avg", "exp_avg_sq", MOMENTUM}
    assert len(one.moments[MOMENTUM]) == 8
    for case, (found, state) in zip(cases, run_ranks(_of_engines, world, cases, True)[0], strict=True):
        assert found == pytest.approx(losses, rel=1e-5), case
        for name, value in one.model.items():
            difference = float((state.model[name] - value).norm() / value.norm().clamp_min(1e-1))
            assert difference < 1e-4, (case, name, difference)
        for name, value in one.moments[MOMENTUM].items():
            torch.testing.assert_close(state.moments[MOMENTUM][name], value, rtol=1e-3, atol=1e-5)


def _updates(engines: list[str]) -> list[dict[str, torch.Tensor]]:
    """The weights of a convolutional network after one update by Muon of a gradient that all ranks have."""
    found = []
    for name in engines:
        engine, plan = start(config_of(name, model=RESNET, layer_decay=None))
        before = gather(engine)
        take_step(engine, plan, of_this_rank(views_of(0), plan), lr=0.01)
        after = gather(engine)
        engine.close()
        if before is not None and after is not None:
            found.append({key: after.model[key] - before.model[key] for key in after.moments[MOMENTUM]})
    return found


@pytest.mark.parametrize("world", mostly_slow([2, 4], 2))
def test_convolutions_of_ranks_are_those_of_one_process(world: int) -> None:
    """Also where the last rank has no rows of one: of 6 outputs four ranks have 2, 2, 2 and none."""
    one = _updates(["single"])[0]
    assert {value.ndim for value in one.values()} == {4}
    for found in run_ranks(_updates, world, ["ddp", "fsdp", *(["hsdp"] if world == 4 else [])])[0]:
        assert found.keys() == one.keys()
        for name, value in found.items():
            assert float((value - one[name]).norm() / one[name].norm()) < 1e-2, name


def test_rounds_have_a_matrix_for_each_rank_and_alike_ones_together() -> None:
    shapes = [(8, 64), (64, 8, 3, 3), (64, 64), (8, 64), (64, 64)]
    assert module.rounds(shapes, 2) == [[1, 2], [4, 0], [3]]
    assert module.rounds(shapes, 1) == [[1], [2], [4], [0], [3]]


def test_the_iterations_flops_are_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ON_CPU", torch.bfloat16)
    for shape in SHAPES:
        with FlopCounterMode(display=False) as counted:
            orthogonal(torch.randn(shape))
        assert counted.get_total_flops() == module.iteration_flops(shape)


def _shares(copies: bool) -> tuple[list[tuple[int, ...]], list[float]]:
    """The matrices that this rank iterates on in a step of three layers, of which ranks hold copies, or whose rows two ranks
    have cut unevenly; and how far each then is from all of its factor's step."""
    made, own = list[tuple[int, ...]](), module.orthogonal
    module.orthogonal = lambda x: made.append(tuple(x.shape)) or own(x)
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 7, bias=False), nn.Linear(7, 7, bias=False))
    alone = copy.deepcopy(layers)
    x = torch.randn(2, 6)
    if not copies:
        fully_shard(layers, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    layers(x).square().sum().backward()
    Muon([{"params": list(layers.parameters())}], lr=0.1, copies=copies).step()
    shared, module.orthogonal = list(made), own
    alone(x).square().sum().backward()
    Muon([{"params": list(alone.parameters())}], lr=0.1).step()
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in layers.parameters()]
    return shared, [float((a - b).abs().max()) for a, b in zip(whole, alone.parameters(), strict=True)]


@pytest.mark.parametrize("copies", [False, True])
def test_ranks_share_the_matrices_out(copies: bool) -> None:
    (first, off), (second, off_too) = run_ranks(_shares, 2, copies)
    assert (first, second) == ([(7, 7), (5, 6)], [(7, 5)])
    assert max(*off, *off_too) < 1e-6


@pytest.mark.slow
def test_in_bf16_ranks_follow_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ON_CPU", torch.bfloat16)
    cases = [("ddp", "fp32"), ("fsdp", "fp32"), ("ddp", "bf16"), ("fsdp", "bf16")]
    losses, one = train(config_of())
    assert one is not None
    for case, (found, state) in zip(cases, run_ranks(_of_engines, 2, cases, False)[0], strict=True):
        assert found == pytest.approx(losses, rel=0.02), case
        name = "encoder.backbone.blocks.1.mlp.fc1.weight"
        assert float((state.model[name] - one.model[name]).norm() / one.model[name].norm()) < 0.02, case


def _go_on(engine: str, folder: str, first: int, save: bool) -> Any:
    """Two steps from the checkpoint of step `first`: the state before them, the losses, and the state after them."""
    store = Store(Path(folder), keep=99)
    saved = Saved(store.root / f"step_{first:08d}") if first else None
    built, plan = start(config_of(engine), saved=saved)
    before = gather(built)
    losses = []
    for step in (first, first + 1):
        result = take_step(built, plan, of_this_rank(views_of(step), plan), step, lr=0.01, weight_decay=0.1)
        losses.append(float(result.loss))
    if save:
        saver = Saver(store, built)
        saver.begin(Progress(first + 2, "shards"), {}, "run: {}\n")
        saver.finish()
    after = gather(built)
    built.close()
    return before, losses, after


def _same(a: CanonicalState, b: CanonicalState) -> bool:
    groups = [(a.model, b.model), *((a.moments[kind], b.moments.get(kind, {})) for kind in a.moments)]
    return a.moments.keys() == b.moments.keys() and all(
        x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x) for x, y in groups
    )


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path: Path) -> None:
    _, _, middle = _go_on("single", str(tmp_path), 0, True)
    before, losses, after = _go_on("single", str(tmp_path), 2, False)
    whole, end = train(config_of(), 0, 4)
    assert end is not None
    assert _same(before, middle)
    assert _same(after, end)
    assert losses == whole[2:]


CHAIN = [("fsdp", 2), ("ddp", 1), ("hsdp", 4), ("ddp", 2), ("fsdp", 2)]


@pytest.mark.slow
def test_checkpoints_go_from_engine_to_engine(tmp_path: Path) -> None:
    """What is read is what was written, to the bit; every element once."""
    found: list[float] = []
    for number, (engine, world) in enumerate(CHAIN):
        state, losses, _ = run_ranks(_go_on, world, engine, str(tmp_path), 2 * number, True)[0]
        found += losses
        saved = Saved(tmp_path / f"checkpoints/step_{2 * number + 2:08d}")
        assert saved.ranks == world
        muons = {name for name, kinds in saved.moments.items() if kinds == (MOMENTUM,)}
        assert len(muons) == 8
        files = sum(f.stat().st_size for f in saved.path.glob("optimizer*.safetensors"))
        elements = {name: torch.Size(shape).numel() for name, (shape, _) in saved.parameters.items()}
        expected = sum(count * (4 if name in muons else 8) for name, count in elements.items())
        assert files == pytest.approx(expected, rel=0.05)
        if number:
            before = Saved(tmp_path / f"checkpoints/step_{2 * number:08d}")
            for kind, tensors in {"value": state.model, **state.moments}.items():
                assert {*tensors} == {*before.shapes_of(kind)}
                assert all(torch.equal(before.whole(name, kind), tensor) for name, tensor in tensors.items())
    whole, _ = train(config_of(), 0, 2 * len(CHAIN))
    assert found == pytest.approx(whole, rel=0.02)


@pytest.mark.parametrize(("before", "now"), [("adamw", "muon"), ("muon", "adamw")])
def test_another_optimizers_state_is_refused_and_the_advice_helps(tmp_path: Path, before: str, now: str) -> None:
    engine, plan = start(config_of(name=before))
    take_step(engine, plan, [views_of(0)])
    saver = Saver(Store(tmp_path, keep=1), engine)
    saver.begin(Progress(1, "shards"), {}, "run: {}\n")
    path = saver.finish()
    assert path is not None
    said = rf"was trained with optim\.name={before}, .* Go on with optim\.name={before}, or begin a new run\.dir"
    for given in ({"saved": Saved(path)}, {"state": gather(engine)}):
        with pytest.raises(UserError, match=said):
            start(config_of(name=now), **given)
    start(config_of(name=before), saved=Saved(path))
