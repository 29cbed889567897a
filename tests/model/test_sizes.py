"""What encoders are asked before anything starts, and whether the advice that they give helps."""

from __future__ import annotations

import re
from typing import Any

import pytest
import timm
import torch
from conftest import small_config

from lejepa_scale.config import validate
from lejepa_scale.errors import UserError
from lejepa_scale.model import Encoder, build
from lejepa_scale.model.lejepa import check


def accepted(encoder: str, sides: dict[str, int], **model: Any) -> Encoder:
    """What `check` builds for views of these sides."""
    views = {name: {"count": 2, "size": side} for name, side in sides.items()}
    return check(validate(small_config("r", "s", data={"shards": "s", "views": views}, model={
        "encoder": encoder, "options": {}, **model,
    }))).encoder  # fmt: skip


@pytest.mark.parametrize(
    ("encoder", "before", "after"),
    [
        ("vit_nano", {"global": 32, "local": 30}, {"global": 32, "local": 32}),
        ("vit_nano", {"global": 30, "local": 32}, {"global": 32, "local": 32}),
        ("beit_base_patch16_224", {"global": 64, "local": 32}, {"global": 64, "local": 64}),  # a table of positions
        ("test_coatnet", {"global": 96, "local": 64}, {"global": 96, "local": 96}),
        ("hiera_tiny_224", {"global": 64, "local": 32}, {"global": 64, "local": 64}),
        ("crossvit_tiny_240", {"global": 64, "local": 32}, {"global": 240, "local": 32}),  # scales what it is given
        ("efficientformer_l1", {"global": 224, "local": 96}, {"global": 224, "local": 224}),
        ("inception_v3", {"global": 64, "local": 64}, {"global": 96, "local": 96}),  # nothing is left of smaller ones
        ("hrnet_w18_small", {"global": 96, "local": 48}, {"global": 96, "local": 64}),  # halved five times
    ],
)
def test_sides_that_cannot_be_processed_are_refused_and_the_advice_helps(
    encoder: str, before: dict[str, int], after: dict[str, int]
) -> None:
    sides, said = dict(before), list[str]()
    while sides != after:
        with pytest.raises(UserError) as refused:
            accepted(encoder, sides)
        said.append(str(refused.value))
        assert "\n" not in said[-1]
        assert encoder in said[-1]
        advice = re.search(r"data\.views\.(global|local)\.size=(\d+)\.$", said[-1])
        assert advice, said[-1]
        assert sides[advice[1]] != int(advice[2])
        sides[advice[1]] = int(advice[2])
        assert len(said) < 4, said
    accepted(encoder, sides)


@pytest.mark.parametrize(
    "encoder", ["swin_tiny_patch4_window7_224", "xcit_nano_12_p8_224", "vit_tiny_r_s16_p8_224", "pvt_v2_b0"]
)
def test_models_that_take_several_sides_are_told_to(encoder: str) -> None:
    """swin pads its windows, xcit's positions are computed, a hybrid's are interpolated: none is built for 224 px alone."""
    accepted(encoder, {"global": 96, "local": 64})


def test_a_configured_grid_is_kept_and_named() -> None:
    with pytest.raises(UserError, match=r"model\.image_size=96\.$"):
        accepted("vit_nano", {"global": 64, "local": 32}, image_size=94)
    with pytest.raises(UserError, match=r"cannot process views of 64 px.*data\.views\.global\.size=96\.$"):
        accepted("beit_base_patch16_224", {"global": 64, "local": 96}, image_size=96)


def test_a_model_that_no_view_fits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Encoder, images: Any) -> Any:
        raise RuntimeError("never\nwhatever comes")

    monkeypatch.setattr(Encoder, "forward", forward)
    with pytest.raises(UserError, match=r"views of 32 px: never. No side near it will do either: choose another model"):
        accepted("vit_nano", {"global": 32, "local": 16})


def test_shared_parameters_are_refused() -> None:
    """Of all of timm CoaT alone has them: 8 models."""
    with pytest.raises(
        UserError,
        match=r"coat_lite_mini cannot be trained here: 64 of its parameters have two names \(.*Choose another",
    ):
        accepted("coat_lite_mini", {"global": 64, "local": 64})


@pytest.mark.unchecked
def test_a_model_that_does_not_pool_is_told_what_does() -> None:
    with pytest.raises(UserError, match=r"\(2, 9, 768\), not \(2, 768\): model\.options\.global_pool=avg"):
        accepted("gemma4_vit_167m_enc", {"global": 144, "local": 144})
    accepted("gemma4_vit_167m_enc", {"global": 144, "local": 144}, options={"global_pool": "avg"})


@pytest.mark.unchecked
@pytest.mark.parametrize("fault", ["map", "unused"])
def test_features_that_are_none_and_parameters_without_a_part_are_refused(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either would fail after a start: at the first step, at the first save."""
    begin = Encoder.__init__

    def init(self: Encoder, *arguments: Any, **more: Any) -> None:
        begin(self, *arguments, **more)
        if fault == "map":
            self.backbone.forward = self.backbone.forward_features
        else:
            self.backbone.spare = torch.nn.Linear(2, 2)

    monkeypatch.setattr(Encoder, "__init__", init)
    said = {
        "map": r"its features of 2 images are \(2, 512, 1, 1\), not \(2, 512\): model.options.global_pool=avg",
        "unused": r"2 of its parameters have no part in its features \(backbone.spare.weight\)",
    }
    with pytest.raises(UserError, match=said[fault]):
        accepted("resnet10t", {"global": 32, "local": 32})


@pytest.mark.parametrize("encoder", ["lcnet_035", "vgg11", "cpubone_nano", "test_vit", "resnet10t"])
def test_the_width_is_that_of_what_comes_out(encoder: str) -> None:
    """timm's num_features is that of the last feature map, which some heads widen: 176 and 1280 for lcnet_035."""
    with torch.device("meta"):
        width = timm.create_model(encoder, num_classes=0)(torch.empty(2, 3, 64, 64)).shape[1]
        model = build(validate(small_config("r", "s", model={"encoder": encoder, "options": {}})))
    assert model.encoder.embed_dim == width
    assert model.projector[0].in_features == width


@pytest.mark.parametrize(
    ("encoder", "size"),
    [
        ("vit_nano", 8),
        ("pvt_v2_b0", None),
        ("swin_tiny_patch4_window7_224", 4),
        ("resnet10t", None),
        ("vit_tiny_r_s16_p8_224", 32),
    ],
)
def test_the_patch_size(encoder: str, size: int | None) -> None:
    with torch.device("meta"):
        assert Encoder(encoder, image_size=64).patch_size == size


@pytest.mark.parametrize(
    "encoder",
    ["vit_nano", "resnet10t", "test_coatnet", "swin_tiny_patch4_window7_224", "hiera_tiny_224", "mvitv2_tiny",
     "xcit_nano_12_p8_224", "test_vit_relpos", "poolformerv2_s12", "vit_tiny_r_s16_p8_224"],
)  # fmt: skip
def test_patch_features_lie_where_the_patches_do(encoder: str) -> None:
    """Moving an image changes its features at the same place: brightness in a corner shows most in that corner."""
    torch.manual_seed(0)
    module = Encoder(encoder, image_size=128)
    for _ in range(10):  # averages of batch normalization, lest everything fades layer by layer
        module([torch.rand(4, 3, 128, 128)])
    module.eval()
    plain = torch.rand(1, 3, 128, 128) * 0.1
    with torch.no_grad():
        before = module.patch_features(plain)
        assert before.shape[1] == before.shape[2] > 1
        for top, left in ((0, 0), (0, 1), (1, 0), (1, 1)):
            bright = plain.clone()
            bright[:, :, 96 * top : 96 * top + 32, 96 * left : 96 * left + 32] += 5
            change = (module.patch_features(bright) - before).norm(dim=-1)[0]
            half = len(change) // 2
            quarters = {(i, j): float(part.mean()) for i, rows in enumerate((change[:half], change[-half:]))
                        for j, part in enumerate((rows[:, :half], rows[:, -half:]))}  # fmt: skip
            assert max(quarters, key=lambda place: quarters[place]) == (top, left), quarters
