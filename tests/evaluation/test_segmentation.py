"""Linear segmentation: its numbers against scikit-learn's and by hand, masks as they are read, images whose colours are the
classes."""

from __future__ import annotations

import io
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from masked import masked, png, squares
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score
from tars import shard
from torch import Tensor, nn

from lejepa_scale.data.images import views
from lejepa_scale.data.images.pixels import DecodeError
from lejepa_scale.data.index.shards import index_shards
from lejepa_scale.data.masks import centre_square, index_masks, read_mask, segmented_batches
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation import Options, evaluate
from lejepa_scale.evaluation.heads import HeadRecipe
from lejepa_scale.evaluation.segmentation import (
    LinearSegmenter,
    _statistics,
    confusion_of,
    iou_of,
    mean_iou,
    segmentation,
)
from lejepa_scale.evaluation.tokens import Tokens
from lejepa_scale.model import Encoder

SHORT = HeadRecipe((1e-3, 1e-2, 1e-1), 8, 60, 1e-4)


# -- numbers


def test_a_table_by_hand() -> None:
    """Of 6 pixels one is ignored. Class 0: 1 right of 2 + 1; class 1: 2 of 2 + 1; class 2: nowhere; class 3: 0 of 1."""
    ids = torch.tensor([[0, 0, 1], [1, 255, 3]])
    guesses = torch.tensor([[0, 1, 1], [1, 0, 0]])
    table = confusion_of(guesses, ids, 4)
    assert table.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    iou = iou_of(table).tolist()
    assert iou[:2] == pytest.approx([1 / 3, 2 / 3])
    assert math.isnan(iou[2])
    assert iou[3] == 0.0
    assert mean_iou(table) == pytest.approx(1 / 3)  # of three classes


def test_numbers_are_scikit_learns() -> None:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 6, (4, 20, 20), generator=draw)
    guesses = torch.where(
        torch.rand(ids.shape, generator=draw) < 0.6, ids, torch.randint(0, 6, ids.shape, generator=draw)
    )
    ids[ids == 4] = 255
    table = confusion_of(guesses, ids, 7)
    truth, guessed = (x[ids != 255].numpy() for x in (ids, guesses))
    assert np.array_equal(table, confusion_matrix(truth, guessed, labels=range(7)))
    expected = jaccard_score(truth, guessed, labels=range(6), average=None)  # class 4 is guessed, and never true
    assert iou_of(table)[:6].tolist() == pytest.approx(expected.tolist())
    assert math.isnan(iou_of(table)[6])
    assert mean_iou(table) == pytest.approx(jaccard_score(truth, guessed, average="macro"))
    assert accuracy_score(truth, guessed) == pytest.approx(float(table.diagonal().sum() / table.sum()))


# -- the layer


def test_the_layer_is_a_convolution_behind_batch_norm_and_torchs_resizing() -> None:
    tokens = 3 + 2 * torch.randn(5, 16, 6)
    norm = nn.BatchNorm2d(6, affine=False, momentum=1.0)
    maps = tokens.mT.unflatten(2, (4, 4))
    norm(maps)  # whose running variance is unbiased
    norm.eval()
    variance, mean = torch.var_mean(tokens.flatten(0, 1), 0, correction=1)
    of_ours = _statistics(whole(tokens, torch.zeros(5, 8, 8, dtype=torch.uint8)))
    torch.testing.assert_close(of_ours, (mean, (variance * 79 / 80 + norm.eps).rsqrt()))
    layer = LinearSegmenter(mean, (variance + norm.eps).rsqrt(), 3)
    expected = F.conv2d(norm(maps), layer.linear.weight[..., None, None], layer.linear.bias)
    expected = F.interpolate(expected, size=(12, 12), mode="bilinear", align_corners=False)
    torch.testing.assert_close(layer(tokens, 12), expected, rtol=1e-4, atol=1e-5)


def toy(count: int, seed: int, classes: int = 3, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Tokens [n, 16, 8] of classes in a grid of 4 x 4, and masks of 8 x 8."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 8, generator=torch.Generator().manual_seed(99))
    ids = torch.randint(0, classes, (count, 16), generator=draw)
    tokens = centres[ids] + noise * torch.randn(count, 16, 8, generator=draw)
    masks = ids.view(count, 4, 4).repeat_interleave(2, 1).repeat_interleave(2, 2)
    return tokens, masks.to(torch.uint8)


def whole(tokens: Tensor, masks: Tensor) -> Tokens:
    return Tokens(tokens, range(len(tokens)), -torch.ones(len(tokens), dtype=torch.long), masks)


def test_training_is_torchs_adamw_on_pixels() -> None:
    """One rate, two steps of all images, beside a plain loop with nn.CrossEntropyLoss."""
    tokens, masks = toy(6, 0)
    masks[:, 0] = 255
    recipe = HeadRecipe((1e-2,), 6, 2, 0.0)
    found = segmentation(whole(tokens, masks), [(tokens, masks)], recipe, norm="none")
    layer = nn.Linear(8, 3)
    nn.init.normal_(layer.weight, std=0.01, generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.AdamW(layer.parameters(), weight_decay=0.0)
    criterion = nn.CrossEntropyLoss(ignore_index=255, reduction="none")

    def logits() -> Tensor:
        return F.interpolate(layer(tokens).mT.unflatten(2, (4, 4)), (8, 8), mode="bilinear")

    for rate in (1e-2, 5e-3):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        criterion(logits(), masks.long()).mean().backward()
        optimizer.step()
    guesses = logits().argmax(1)
    assert torch.equal(found.confusion, confusion_of(guesses, masks, 3))
    assert found.confusion.sum() == 6 * 7 * 8


def test_it_learns_scales_and_says_what_it_did() -> None:
    (tokens, masks), (test, truth) = toy(60, 0), toy(20, 1)
    scales = torch.logspace(-2, 2, 8)  # which no single rate fits without a norm
    found = segmentation(whole(tokens * scales, masks), [(test * scales, truth)], SHORT)
    plain = segmentation(whole(tokens * scales, masks), [(test * scales, truth)], SHORT, norm="none")
    assert found.miou > plain.miou + 0.02
    assert found.settings["held_out_miou"] == max(found.settings["miou_by_rate"].values())
    assert found.settings.items() >= {"classes": 3, "norm": "batch", "mask_size": 8, "held_out_images": 6}.items()
    in_parts = zip((test * scales).split(7), truth.split(7), strict=True)
    again = segmentation(whole(tokens * scales, masks), in_parts, SHORT)
    assert torch.equal(again.confusion, found.confusion)


def test_what_cannot_be_segmented_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    tokens, masks = toy(6, 0)
    with pytest.raises(UserError, match="all pixels of the 6 training masks are of class 2"):
        segmentation(whole(tokens, torch.full_like(masks, 2)), [])
    with pytest.raises(UserError, match="all pixels of the 6 training masks are 255, which is no class"):
        segmentation(whole(tokens, torch.full_like(masks, 255)), [])
    with pytest.raises(UserError, match="needs 2 training images"):
        segmentation(whole(tokens[:1], masks[:1]), [])
    with pytest.raises(UserError, match="this encoder has 15 of them"):
        segmentation(whole(tokens[:, 1:], masks), [])
    with pytest.raises(UserError, match="the test masks have no pixel"):
        segmentation(whole(tokens, masks), [(tokens, torch.full_like(masks, 255))], SHORT)
    with pytest.raises(UserError, match="all 1 heads of linear segmentation diverged"):
        segmentation(whole(tokens, masks), [], HeadRecipe((1e30,), 4, 9, 0.1))
    beyond = masks.clone()
    beyond[0, 0, :3] = 7
    with caplog.at_level(logging.WARNING):
        found = segmentation(whole(tokens, masks), [(tokens, beyond)], SHORT)
    assert "3 of 384 test pixels are of classes beyond the 3 of the training masks" in caplog.text
    assert found.iou[7] == 0.0
    assert found.confusion.shape == (8, 8)


# -- masks


def test_masks_are_read_as_ids() -> None:
    ids = np.array([[0, 1, 2], [255, 3, 254]], np.uint8)
    palette = Image.fromarray(ids, "P")
    palette.putpalette([int(x) for x in np.random.default_rng(0).integers(0, 256, 768)])
    out = io.BytesIO()
    palette.save(out, "png")
    assert np.array_equal(read_mask(png(ids)), ids)
    assert np.array_equal(read_mask(out.getvalue()), ids)  # the indices, not their colours
    assert np.array_equal(read_mask(png(ids.astype(np.uint16))), ids)
    array = io.BytesIO()
    np.save(array, ids.astype(np.int64))
    assert np.array_equal(read_mask(array.getvalue()), ids)
    assert np.array_equal(read_mask(png(ids > 1)), ids > 1)


@pytest.mark.parametrize(
    ("mask", "classes", "message"),
    [
        (
            np.array([[0, 5], [5, 255]], np.uint8),
            5,
            r"class id 5 in 2 of 4 pixels; ids are 0\.\.4, and 255 is no class",
        ),
        (np.array([[0, 300]], np.uint16), None, r"class id 300 in 1 of 2 pixels; ids are 0\.\.254"),
        (np.zeros((2, 2, 3), np.uint8), None, r"3 bands \(RGB\), where class ids are one number"),
    ],
)
def test_masks_that_are_none_are_refused(mask: np.ndarray, classes: int | None, message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        read_mask(png(mask), classes)
    with pytest.raises(DecodeError, match="no picture that can be read"):
        read_mask(b"nothing")


@pytest.mark.parametrize("shape", [(64, 64), (64, 96), (130, 64), (640, 16), (16, 500), (33, 47)])
def test_masks_and_images_are_cut_alike(shape: tuple[int, int]) -> None:
    """A mask of two halves, once as an image: they agree but for pixels at the border of the halves."""
    for axis in (0, 1):
        mask = np.zeros(shape, np.uint8)
        half = [slice(None), slice(None)]
        half[axis] = slice(shape[axis] // 2, None)
        mask[tuple(half)] = 1
        image = views.centre_square(np.repeat(200 * mask[..., None], 3, 2), 16)[..., 0]
        found = centre_square(mask, 16)
        between = (image > 20) & (image < 180)
        assert between.sum() <= 32
        assert np.array_equal((image > 100)[~between], (found == 1)[~between])


def test_masks_are_resized_as_by_pillow() -> None:
    mask = np.random.default_rng(0).integers(0, 9, (33, 47)).astype(np.uint8)
    whole = Image.fromarray(mask).resize((23, 16), Image.Resampling.NEAREST)  # 47 x 16 / 33 = 22.8
    assert np.array_equal(centre_square(mask, 16), np.asarray(whole)[:, 3:19])
    assert np.array_equal(centre_square(mask[:, :33], 66), mask[:, :33].repeat(2, 0).repeat(2, 1))


def batches(path: str, size: int = 32, **more: Any) -> list[Any]:
    shards = index_shards([path])
    key = more.pop("mask_key", "mask.png")
    return list(segmented_batches(shards, index_masks(shards, key), image_size=size, batch_size=4, **more))


def test_images_and_masks_come_together(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = {f"{number}.png": png(squares(number)[0]) for number in range(6)}
    members |= {f"{number}.MASK.png": png(squares(number)[1]) for number in (5, 4, 3, 1, 0)}  # in another order
    jpeg = io.BytesIO()
    Image.fromarray(squares(2)[0]).save(jpeg, "jpeg")
    members = {name.replace("2.png", "2.jpg"): data for name, data in members.items()} | {"2.jpg": jpeg.getvalue()}
    path = shard(tmp_path / "s.tar", members)
    with caplog.at_level(logging.WARNING):
        found = batches(path)
    assert [batch.keys for batch in found] == [["0", "1", "3", "4"], ["5"]]
    assert "sample 2 at byte" in caplog.text
    assert "it has no mask" in caplog.text
    image, mask = squares(3)
    assert np.array_equal(found[0].images[2].permute(1, 2, 0), image)
    assert np.array_equal(found[0].masks[2], mask)
    parts = [key for i in range(3) for batch in batches(path, part=(i, 3)) for key in batch.keys]
    assert parts == ["0", "1", "3", "4", "5"]
    assert [len(batch.masks) for batch in batches(path, threads=1)] == [4, 1]


def test_what_is_wrong_with_masks_is_named(tmp_path: Path) -> None:
    image, mask = squares(0)
    path = shard(tmp_path / "a.tar", {"x.png": png(image), "x.mask.png": png(mask[:16])})
    with pytest.raises(UserError, match=r"the mask of .*a\.tar, sample x has 32 x 16 pixels, and its image 32 x 32"):
        batches(path)
    path = shard(tmp_path / "b.tar", {"x.png": png(image), "x.mask.png": png(mask)})
    with pytest.raises(
        UserError, match=r"the mask of .*b\.tar, sample x: class id 2 in \d+ of 1,024 pixels; ids are 0"
    ):
        batches(path, classes=2)
    with pytest.raises(
        UserError, match=r"KEY\.seg\.png.*holds no images \(members ending in seg\.png\).*end in mask\.png"
    ):
        batches(path, mask_key="seg.png")


# -- encoders


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("masked")
    return masked(folder / "train/s.tar", 60), masked(folder / "test/s.tar", 20, first=1000)


@pytest.mark.parametrize("name", ["vit_nano", "resnet10t"])
def test_a_random_encoder_tells_colours_apart(name: str, sets: tuple[str, str], tmp_path: Path) -> None:
    """Squares of 8 pixels; a ViT with patches of as many, and a ResNet whose last map is coarser, at a larger image size."""
    torch.manual_seed(0)
    vit = name == "vit_nano"
    options = {"patch_size": 8, "depth": 1} if vit else {"output_stride": 8}
    encoder = Encoder(name, image_size=32 if vit else 64, options=options)
    chosen = Options(("segmentation",), segmentation=replace(SHORT, steps=150), mask_classes=3)
    size = 32 if vit else 64
    found = evaluate(encoder, *sets, options=chosen, image_size=size, device="cpu", cache=tmp_path / "cache")
    (row,) = found.results
    assert row.metrics["miou"] > (0.9 if vit else 0.75)  # bilinear logits round the corners of squares
    assert row.metrics["pixel_accuracy"] > row.metrics["miou"]
    assert {"iou_0", "iou_1", "iou_2"} <= row.metrics.keys()
    assert row.settings["mask_key"] == "mask.png"
    assert (row.features, row.width, found.features) == ("patches", encoder.embed_dim, None)
    assert found.sets == {"train": {"images": 60}, "test": {"images": 20}}
    assert sum(map(sum, row.confusion)) == 20 * (size**2 - (size // 4) ** 2)
    assert not list((tmp_path / "cache").iterdir())


class _NoMap(nn.Module):
    """An encoder whose features are pooled."""

    num_features = 4

    def forward_features(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :4]

    def forward_head(self, features: Tensor) -> Tensor:
        return features


def test_an_encoder_without_tokens_is_refused() -> None:
    from lejepa_scale.evaluation.features import patch_tokens

    several = timm.create_model("crossvit_9_240", num_classes=0).eval()
    for model, size in ((_NoMap(), 8), (several, 240)):
        with pytest.raises(
            UserError, match=f"a {type(model).__name__} has no tokens of patches, nor one map at its end"
        ):
            patch_tokens(model, torch.zeros(1, 3, size, size))
