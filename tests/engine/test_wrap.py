"""How blocks run changes time and memory, not results: recomputation, compilation, float8, host memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from conftest import small_config
from ranks import run_ranks
from steps import of_this_rank, start, take_step
from torch import Tensor

from lejepa_scale.config import Config, validate
from lejepa_scale.engine import wrap
from lejepa_scale.errors import UserError
from lejepa_scale.model import build, check

Step = tuple[float, float]


def _config(engine: dict[str, Any], **model: Any) -> Config:
    engine = {"name": "single", "precision": "fp32", **engine}
    return validate(small_config("unused", "unused", engine=engine, model={"drop_path": 0.4, **model}))


def _steps(config: Config, steps: int = 2) -> tuple[list[Step], int]:
    """Losses and gradient norms, and the bytes that the first step's forward pass kept for its backward pass."""
    engine, plan = start(config)
    history, kept = [], 0
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        views = [torch.randn(2, 16, 3, size, size, generator=generator) for size in (32, 16)]
        storages: dict[int, int] = {}
        result = take_step(engine, plan, of_this_rank(views, plan), step, phase=partial(_noting, storages))
        kept = kept or sum(storages.values())
        history.append((float(result.loss), float(result.grad_norm)))
    return history, kept


@contextmanager
def _noting(storages: dict[int, int], phase: str) -> Iterator[None]:
    """Note what the forward pass keeps."""

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t) if phase == "forward" else nullcontext():
        yield


def test_recomputation_changes_no_gradient_and_keeps_less() -> None:
    history, kept = {}, {}
    for kind in ("none", "selective", "full"):
        history[kind], kept[kind] = _steps(_config({"activation_checkpointing": kind}, options={"depth": 6}))
    assert history["full"] == history["selective"] == history["none"]
    assert kept["full"] < 0.5 * kept["none"]
    # selective frees its tensors through a hook of its own, which this one does not see


def test_a_timm_model_recomputes_in_its_own_way() -> None:
    found = [
        _steps(_config({"activation_checkpointing": kind}, encoder="resnet10t", options={}, drop_path=0.0))
        for kind in ("none", "full")
    ]
    assert found[0][0] == found[1][0]
    assert found[1][1] < found[0][1]


def test_selective_keeps_products_and_attention_alone() -> None:
    kept = {"aten::mm", "aten::addmm", "aten::_scaled_dot_product_flash_attention_for_cpu", "torch_attn::_varlen_attn"}
    kept |= {"aten::_scaled_mm", "xformers_flash::flash_fwd", "xformers::efficient_attention_forward_cutlass"}
    dropped = {"aten::gelu", "aten::native_layer_norm", "aten::add", "aten::silu", "aten::bmm", "aten::index_select"}

    class Operator:
        def __init__(self, name: str) -> None:
            self._name = name

        def name(self) -> str:
            return self._name

    policies = {name: wrap._policy(None, Operator(name)) for name in kept | dropped}
    assert {name for name, policy in policies.items() if policy == wrap.CheckpointPolicy.MUST_SAVE} == kept


@pytest.mark.traced
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "selective", "budget"])
def test_compiled_blocks_give_the_same_step(kind: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = {"drop_path_uniform": True, "options": {"depth": 3}}
    eager, everything = _steps(_config({}, **model))
    settings = {"compile": True, "activation_checkpointing": kind}
    settings |= {"activation_budget": 0.3} if kind == "budget" else {}
    compiled, kept = _steps(_config(settings, **model))
    torch.testing.assert_close(torch.tensor(compiled), torch.tensor(eager), rtol=1e-4, atol=0)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1  # fixed shapes: one graph for all blocks and steps
    if kind == "budget":
        assert kept < 0.6 * everything


def _emulated(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(wrap, "use_float8", partial(wrap.use_float8, emulate=True))


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_float8_layers_follow_bf16(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated: rounded to float8 and multiplied in fp32. The layers keep their parameters' names."""
    pytest.importorskip("torchao")
    model = {"options": {"depth": 2}, "projector": {"hidden": 64, "dim": 16}}
    plain, _ = _steps(_config({"precision": "bf16"}, **model))
    _emulated(monkeypatch)
    config = _config({"precision": "bf16", "fp8": True, "fp8_recipe": recipe}, **model)
    rounded, _ = _steps(config)
    torch.testing.assert_close(torch.tensor(rounded), torch.tensor(plain), rtol=0.2, atol=0)
    assert rounded != plain
    with torch.device("meta"):
        module, untouched = build(config), build(config)
    wrap.use_float8(module.encoder)
    linears = [type(layer).__name__ for layer in module.encoder.blocks[0].modules() if hasattr(layer, "in_features")]
    assert linears == ["Float8Linear"] * 4
    assert [n for n, _ in module.named_parameters()] == [n for n, _ in untouched.named_parameters()]


def _float8_on_rank(names: list[str]) -> list[list[Step]]:
    with pytest.MonkeyPatch.context() as patch:
        _emulated(patch)
        engine = {"precision": "bf16", "fp8": True, "fp8_recipe": "rowwise"}
        return [_steps(_config({"name": name, **engine}, drop_path=0.0))[0] for name in names]


def test_float8_is_the_same_under_every_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a rank's own activations, whose largest values are the scales of a row: within what bf16 differs by."""
    pytest.importorskip("torchao")
    plain, _ = _steps(_config({"precision": "bf16"}, drop_path=0.0))
    names = ["fsdp", "zero1", "zero2", "zero3"]
    (one,) = _float8_on_rank(["single"])
    for name, history in zip(names, run_ranks(_float8_on_rank, 2, names)[0], strict=True):
        torch.testing.assert_close(
            torch.tensor(history), torch.tensor(one), rtol=0.02, atol=0, msg=lambda text, n=name: f"{n}: {text}"
        )
        assert history != plain


def test_a_weight_by_reference_is_the_one_of_the_backward_pass() -> None:
    """ZeRO-3 takes a weight away between the passes: what the forward pass saw is not kept."""
    torchao = pytest.importorskip("torchao.float8")
    layer = torch.nn.Sequential(torch.nn.Linear(32, 16, bias=False, dtype=torch.bfloat16))
    torchao.convert_to_float8_training(layer, config=torchao.Float8LinearConfig(emulate=True))
    layer[0].forward = wrap._weight_by_reference(layer[0], layer[0].forward)
    x, grad = torch.randn(64, 32).bfloat16(), torch.randn(64, 16).bfloat16()
    weight, expected = layer[0].weight, []
    for values in (weight.data.clone(), torch.randn(16, 32).bfloat16()):
        weight.data, weight.grad = values, None
        own = x.clone().requires_grad_()
        layer(own).backward(grad)
        expected.append((own.grad, weight.grad))
    assert expected[0][0] is not None
    assert not torch.equal(expected[0][0], expected[1][0])
    kept, other = weight.data, torch.randn(16, 32).bfloat16()
    own, weight.grad, weight.data = x.clone().requires_grad_(), None, other
    out = layer(own)
    weight.data = kept
    out.backward(grad)
    assert own.grad is not None
    assert torch.equal(own.grad, expected[1][0])
    assert torch.equal(weight.grad, expected[1][1])  # which is of the input alone


def _rounding(bits: int) -> float:
    """The relative error's root mean square of rounding to so many bits of mantissa, if the mantissa's logarithm is uniform:
    half a last place over sqrt(3), times the root mean square of 1 / m for m in [1, 2)."""
    return 2.0 ** -(bits + 1) / 3**0.5 * ((1 - 1 / 4) / (2 * math.log(2))) ** 0.5


E4M3, E5M2, BF16 = _rounding(3), _rounding(2), _rounding(7)


@pytest.mark.parametrize(
    ("recipe", "of_input", "of_weight"),  # what output, input's and weight's gradient are products of
    [
        ("tensorwise", (E5M2, E4M3), (E5M2, E4M3)),
        ("rowwise", (E4M3, E4M3), (E4M3, E4M3)),
        ("rowwise_with_gw_hp", (E4M3, E4M3), (BF16,)),  # of bf16's own numbers: the result alone is rounded
    ],
)
def test_float8_recipes_round_as_their_names_say(
    recipe: str, of_input: tuple[float, ...], of_weight: tuple[float, ...]
) -> None:
    pytest.importorskip("torchao")
    encoder = build(_config({}, options={"depth": 1, "embed_dim": 256, "num_heads": 4}, drop_path=0.0)).encoder
    exact = encoder.blocks[0].attn.proj.weight.detach().bfloat16().double()
    encoder.bfloat16()
    wrap.use_float8(encoder, recipe, emulate=True)
    layer = encoder.blocks[0].attn.proj
    x, grad = (torch.randn(512, 256).bfloat16() for _ in range(2))
    own = x.clone().requires_grad_()
    out = layer(own) - layer.bias
    out.backward(grad)
    for found, wanted, errors in (
        (out, x.double() @ exact.T, (E4M3, E4M3)),
        (own.grad, grad.double() @ exact, of_input),
        (layer.weight.grad, grad.double().T @ x.double(), of_weight),
    ):
        assert found is not None
        off = float((found.detach().double() - wanted).norm() / wanted.norm())
        assert off == pytest.approx(math.hypot(*errors), rel=0.03)


def test_float8_is_refused_without_a_chip_for_it() -> None:
    pytest.importorskip("torchao")
    if torch.cuda.is_available():
        pytest.skip("this machine may have one")
    config = _config({"precision": "bf16", "fp8": True})
    with torch.device("meta"):
        encoder = build(config).encoder
    with pytest.raises(UserError, match=r"L40S, H100 or later.*not this CPU"):
        wrap.use_float8(encoder)


def _on_rank(settings: list[dict[str, Any]]) -> list[list[Step]]:
    return [_steps(_config(s, drop_path=0.0))[0] for s in settings]


def test_host_memory_and_prefetch_change_nothing() -> None:
    settings = [
        {"name": name, **more}
        for name, more in (
            ("fsdp", {}), ("fsdp", {"cpu_offload": True}), ("fsdp", {"prefetch": 0}), ("fsdp", {"prefetch": 9}),
            ("fsdp", {"activation_checkpointing": "full"}), ("fsdp", {"activation_checkpointing": "selective"}),
            ("zero3", {"activation_checkpointing": "full"}), ("zero3", {"activation_checkpointing": "selective"}),
            ("zero3", {"cpu_offload": True}), ("zero1", {"cpu_offload": True}),
        )
    ]  # fmt: skip
    one, _ = _steps(_config({}, drop_path=0.0))
    for setting, history in zip(settings, run_ranks(_on_rank, 2, settings)[0], strict=True):
        torch.testing.assert_close(
            torch.tensor(history), torch.tensor(one), rtol=1e-5, atol=0, msg=lambda text, s=setting: f"{s}: {text}"
        )


def test_what_needs_blocks_is_refused_without_them() -> None:
    for settings in ({"compile": True}, {"activation_checkpointing": "selective"}):
        with pytest.raises(UserError, match="works on the blocks of a vision transformer, and resnet10t has none"):
            check(_config(settings, encoder="resnet10t", options={}, drop_path=0.0))
