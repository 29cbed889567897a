"""Building encoders, what they return, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from lejepa_scale.errors import UserError
from lejepa_scale.model import Encoder, attention
from lejepa_scale.model.attention import Packing, choose_backend


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "vit_base_patch16_xp_224"])
def test_other_models_run_unpacked(name: str) -> None:
    encoder = Encoder(name, image_size=64, options={"depth": 1} if "vit" in name else {})  # parallel blocks
    assert not encoder.packed
    plain = timm.create_model(**encoder.timm_arguments).eval()
    plain.load_state_dict(encoder.backbone.state_dict())
    images = [torch.randn(2, 3, 64, 64), torch.randn(3, 3, 32, 32)]
    encoder.eval()
    torch.testing.assert_close(encoder(images), [plain(x) for x in images], rtol=1e-4, atol=1e-5)
    assert encoder.patch_features(images[0]).shape[-1] == encoder.embed_dim


@pytest.mark.parametrize("name", ["vit_nano", "vit_small_patch14_reg4_dinov2", "resnet10t"])
def test_a_head_is_timms_classifier(name: str) -> None:
    encoder = Encoder(name, image_size=56, head_dim=40, options={"depth": 2} if "vit" in name else {}).eval()
    assert encoder.timm_arguments["num_classes"] == 40
    plain = timm.create_model(**encoder.timm_arguments).eval()
    plain.load_state_dict(encoder.backbone.state_dict())
    images = [torch.randn(2, 3, 56, 56)]
    torch.testing.assert_close(encoder(images), [plain(x) for x in images], rtol=1e-4, atol=1e-5)
    assert encoder(images)[0].shape == (2, encoder.embed_dim) == (2, 40)


def test_patch_features_are_the_tokens_in_their_place() -> None:
    encoder = Encoder("vit_nano", image_size=32).eval()
    image = torch.randn(1, 3, 32, 32)
    tokens = encoder.patch_features(image)
    plain = timm.create_model(**encoder.timm_arguments).eval()
    plain.load_state_dict(encoder.backbone.state_dict())
    expected = plain.forward_features(image)[0, 1:]  # row by row, after the class token
    for place in range(16):
        torch.testing.assert_close(tokens[0, place // 4, place % 4], expected[place], rtol=1e-4, atol=1e-5)


def test_unknown_names_and_impossible_sizes_are_refused() -> None:
    with pytest.raises(UserError, match=r"did you mean .*vit_small_patch16_224"):
        Encoder("vit_smal_patch16_224")
    with pytest.raises(UserError, match="timm refuses"):
        Encoder("vit_nano", options={"dept": 3})
    with pytest.raises(UserError, match=r"model.options.num_classes is set by model.head_dim"):
        Encoder("vit_nano", options={"num_classes": 3})


def test_a_backend_that_cannot_run_here_is_refused_by_name() -> None:
    arguments = {"heads": 2, "head_dim": 8, "device": torch.device("cpu"), "dtype": torch.float32}
    packing = Packing(((2, 3),))
    assert choose_backend("auto", packing, **arguments) == "sdpa"
    with pytest.raises(UserError, match="xformers: needs CUDA"):
        choose_backend("xformers", packing, **arguments)


@pytest.mark.unchecked
def test_a_backend_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """xformers words its reasons last, after a description of what it was given."""

    def refuse(*_: Any) -> None:
        raise NotImplementedError(
            "No operator found with inputs:\n  query: torch.bfloat16\n  it was not built for this\n"
        )

    monkeypatch.setattr(attention, "_draw", lambda *_: None)
    monkeypatch.setattr(attention, "_forward_backward", refuse)
    found = attention._fault("xformers", Packing(((2, 3),)), 2, 8, torch.device("cuda"), torch.bfloat16)
    assert found == "No operator found with inputs: ... it was not built for this"


def test_auto_is_the_fastest_backend_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults and times are made up here, since other backends need a GPU; random numbers are left alone."""
    faults = {"xformers": "no kernel", "varlen": None, "sdpa": None}
    seconds = {"xformers": 1.0, "varlen": 2.0, "sdpa": 3.0}
    monkeypatch.setattr(attention, "_fault", lambda name, *_: faults[name])
    monkeypatch.setattr(attention, "_seconds", lambda name, *_: seconds[name])
    arguments = {"heads": 3, "head_dim": 8, "device": torch.device("cpu"), "dtype": torch.float32}
    assert choose_backend("auto", Packing(((2, 7),)), **arguments) == "varlen"
    seconds["sdpa"] = 1.5
    assert choose_backend("auto", Packing(((2, 8),)), **arguments) == "sdpa"
    faults["xformers"] = None
    assert choose_backend("auto", Packing(((2, 9),)), **arguments) == "sdpa"  # whatever xformers takes: varlen runs
    faults["varlen"] = "torch is too old"
    assert choose_backend("auto", Packing(((2, 10),)), **arguments) == "xformers"
    assert choose_backend("auto", Packing(((2, 10),)), **arguments, traced=True) == "sdpa"
    before = torch.get_rng_state()
    inputs = attention._draw(Packing(((2, 4), (3, 2))), 2, 8, torch.device("cpu"), torch.float32)
    out, *gradients = attention._forward_backward("sdpa", inputs, Packing(((2, 4), (3, 2))))
    assert out.shape == (14, 2, 8)
    assert attention.offsets(Packing(((2, 4), (3, 2))), torch.device("cpu")).tolist() == [0, 4, 8, 10, 12, 14]
    assert all(g.shape == out.shape for g in gradients)
    assert torch.equal(torch.get_rng_state(), before)


def test_uniform_stochastic_depth_is_refused_where_blocks_are_timms() -> None:
    with pytest.raises(UserError, match="resnet18 has rates of its own"):
        Encoder("resnet18", drop_path=0.1, drop_path_uniform=True)
