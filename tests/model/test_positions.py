"""Positions for other sizes, against timm's own."""

from __future__ import annotations

import pytest
import timm
import torch
from conftest import DEVICES
from timm.layers import resample_abs_pos_embed

from lejepa_scale.model import Encoder, positions

OWNER = torch.nn.Identity()


@pytest.mark.parametrize(
    ("old", "new", "prefix"),
    [
        ((37, 37), (16, 16), 1),
        ((16, 16), (7, 7), 0),
        ((14, 14), (20, 9), 5),
        ((7, 7), (37, 37), 1),
        ((9, 4), (4, 9), 0),
    ],
)
def test_a_resampled_table_and_its_gradient_are_timms(old: tuple[int, int], new: tuple[int, int], prefix: int) -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(1, prefix + old[0] * old[1], 24, generator=generator)
    ours, theirs = (table.clone().requires_grad_() for _ in range(2))
    found = positions.resampled(ours, prefix, old, new, owner=OWNER)
    expected = resample_abs_pos_embed(theirs, list(new), list(old), prefix)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    given = torch.randn(expected.shape, generator=generator)
    for out in (found, expected):
        out.backward(given)
    sums = 1e-5  # absolute: of up to 300 numbers, added in another order
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=sums)
    low = positions.resampled(table.bfloat16(), prefix, old, new, owner=OWNER)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low, resample_abs_pos_embed(table.bfloat16(), list(new), list(old), prefix))
    with torch.autocast("cpu", torch.bfloat16):  # in which a product would be of bf16
        assert torch.equal(positions.resampled(table, prefix, old, new, owner=OWNER), found)


def test_a_table_of_the_same_grid_is_the_table() -> None:
    table = torch.randn(1, 17, 8)
    assert positions.resampled(table, 1, (4, 4), (4, 4), owner=OWNER) is table


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_the_same_bits_every_time(device: str) -> None:
    """That of torch's interpolation adds in any order on CUDA."""
    table = torch.randn(1, 1370, 64, device=device, requires_grad=True)
    given = torch.randn(1, 50, 64, device=device)
    torch.use_deterministic_algorithms(True, warn_only=False)
    try:
        grads = [
            torch.autograd.grad(positions.resampled(table, 1, (37, 37), (7, 7), owner=OWNER), table, given)[0]
            for _ in range(3)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(grads[0], grad) for grad in grads)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "eva02_tiny_patch14_224", "vit_small_patch16_rope_224"])
def test_rotary_positions_are_timms_and_made_once(name: str) -> None:
    rope = timm.create_model(name, depth=1, dynamic_img_size=True).rope
    for grid in ((4, 4), (3, 7)):
        with torch.inference_mode():  # those of an evaluation are good for a step that trains
            found = positions.rotary(rope, grid)
        assert torch.equal(found, rope.get_embed(shape=list(grid)))
        assert positions.rotary(rope, grid) is found
        (torch.ones_like(found, requires_grad=True) * found).sum().backward()


def test_what_is_learned_or_drawn_is_made_each_time() -> None:
    mixed = timm.create_model("vit_small_patch16_rope_mixed_224", depth=1, dynamic_img_size=True).rope
    before = positions.rotary(mixed, (4, 4)).detach().clone()
    with torch.no_grad():
        mixed.freqs.add_(0.1)
    assert not torch.equal(positions.rotary(mixed, (4, 4)), before)
    drawn = timm.create_model("vit_small_patch16_dinov3", depth=1, dynamic_img_size=True).rope
    drawn.shift_coords, drawn.aug_active = 0.5, True
    drawn.train()
    assert not torch.equal(positions.rotary(drawn, (4, 4)), positions.rotary(drawn, (4, 4)))
    drawn.eval()
    assert positions.rotary(drawn, (4, 4)) is positions.rotary(drawn, (4, 4))


def test_an_encoder_of_one_size_alone_is_packed_too() -> None:
    encoder = Encoder("vit_nano", image_size=32, options={"dynamic_img_size": False}).eval()
    assert encoder.packed
    images = torch.randn(2, 3, 32, 32)
    plain = timm.create_model(**encoder.timm_arguments).eval()
    plain.load_state_dict(encoder.backbone.state_dict())
    torch.testing.assert_close(encoder([images])[0], plain(images))
