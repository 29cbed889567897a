"""Fine-tuning against a plain loop in torch, timm's layer-wise rates, and itself on other numbers of ranks."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from masked import png
from ranks import run_ranks
from tars import shard
from timm.layers import DropPath
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torchvision.transforms import RandomResizedCrop

from lejepa_scale.data.evaluation import Labelled, RandomCrop, Samples, labelled_batches
from lejepa_scale.data.images.photometric import normalize
from lejepa_scale.data.index.classes import class_numbers
from lejepa_scale.data.index.shards import index_shards
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.finetune import (
    FinetuneRecipe,
    PartialDropPath,
    finetune,
    rated_groups,
    with_classifier,
    with_drop_path,
)
from lejepa_scale.parallel.process_group import rank, world_size

PLAIN = FinetuneRecipe((1e-3,), epochs=1, batch=24, drop_path=0.0, crop=1.0, flip=0.0)


def vit(**more: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, depth=3, embed_dim=48, **more).eval()


def samples(path: Any, size: int = 32, **more: Any) -> Samples:
    shards = index_shards([str(path)] if str(path).endswith(".tar") else sorted(map(str, Path(path).glob("*.tar"))))
    return Samples(shards, class_numbers([shards]), image_size=size, **more)


def of_test(path: Any) -> Iterator[Labelled]:
    return labelled_batches(str(path), image_size=32, batch_size=40, part=(rank(), world_size()))


def tuned(model: Any, train: Samples, test: Any, recipe: FinetuneRecipe, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model after training on all images, and its guesses."""
    from lejepa_scale.evaluation import finetune as module

    kept = []
    logits = module._Work.logits

    def watched(self: Any, model: Any, images: Tensor) -> Any:
        kept.append(model)
        return logits(self, model, images)

    monkeypatch.setattr(module._Work, "logits", watched)
    return finetune(model, train, test, recipe), kept[-1]


def test_all_steps_are_those_of_a_plain_loop(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps of 24 whole images: timm's model and groups, torch's AdamW, loss and label smoothing."""
    model, train = vit(), samples(scenes)
    before = copy.deepcopy(model.state_dict())
    guesses, found = tuned(model, train, of_test(scenes), PLAIN, monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))

    (batch,) = labelled_batches(str(scenes), image_size=32, batch_size=96)
    images = normalize(batch.images)
    theirs = vit()
    theirs.reset_classifier(10)
    nn.init.zeros_(theirs.head.weight)
    nn.init.zeros_(theirs.head.bias)
    skip = theirs.no_weight_decay()
    groups = param_groups_layer_decay(theirs, weight_decay=0.05, no_weight_decay_list=skip, layer_decay=0.75)
    optimizer = torch.optim.AdamW(groups)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    theirs.train()
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    for step, share in enumerate([1.0, 0.853553, 0.5, 0.146447]):  # (1 + cos(pi step / 4)) / 2
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * 24 / 256 * group["lr_scale"] * share
        rows = order[24 * step :][:24]
        optimizer.zero_grad()
        criterion(theirs(images[rows]), batch.labels[rows]).backward()
        optimizer.step()
    for (name, a), b in zip(found.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-6, msg=name)
    assert guesses.settings.items() >= {"scaled_rate": 1e-3 * 24 / 256, "steps": 4, "batch": 24, "epochs": 1}.items()
    expected = theirs.eval()(images).argmax(1)
    assert float((guesses.ranked[:, 0] == expected).float().mean()) > 0.95


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t", "convnext_atto"])
def test_rates_fall_layer_by_layer_as_timms(name: str) -> None:
    model = with_classifier(timm.create_model(name, num_classes=0), 3)
    groups = rated_groups(model, 0.1, FinetuneRecipe(layer_decay=0.5))
    expected = param_groups_layer_decay(model, 0.05, getattr(model, "no_weight_decay", set)(), layer_decay=0.5)
    assert len(groups) == len(expected)
    for ours, theirs in zip(groups, expected, strict=True):
        assert all(a is b for a, b in zip(ours["params"], theirs["params"], strict=True))
        assert (ours["lr"], ours["weight_decay"]) == (0.1 * theirs["lr_scale"], theirs["weight_decay"])
    rate_of = {id(p): group["lr"] for group in groups for p in group["params"]}
    head = model.get_classifier()
    assert rate_of[id(head.weight)] == 0.1
    assert min(rate_of.values()) < 0.03
    assert not head.weight.any()
    assert not head.bias.any()


def test_drop_path_is_timms_with_masks_for_a_whole_batch() -> None:
    rates = [[m.drop_prob for m in vit(drop_path_rate=0.4).modules() if isinstance(m, DropPath)]]
    model = vit()
    drops = with_drop_path(model, 0.4)
    rates.append([m.drop_prob for m in model.modules() if isinstance(m, PartialDropPath) and m.drop_prob])
    assert rates[0] == pytest.approx(rates[1])
    assert [m.drop_prob for m in drops.modules] == pytest.approx([0, 0, 0.2, 0.2, 0.4, 0.4])
    module = drops.modules[-1].train()
    drops.draw(torch.arange(4000), 4000, (0, 3))
    x = torch.ones(4000, 2, 3)
    whole = module(x)
    assert sorted(whole.unique().tolist()) == pytest.approx([0, 1 / 0.6])  # as timm scales what is kept
    assert float((whole == 0).float().mean()) == pytest.approx(0.4, abs=0.03)
    drops.draw(torch.arange(7, 90), 4000, (0, 3))
    assert torch.equal(module(x[7:90]), whole[7:90])
    drops.draw(torch.arange(4000), 4000, (0, 4))
    assert not torch.equal(module(x), whole)
    assert torch.equal(module.eval()(x), x)
    resnet = timm.create_model("resnet10t", num_classes=0)
    drops = with_drop_path(resnet, 0.3)
    assert [m.drop_prob for m in drops.modules] == pytest.approx([0, 0.1, 0.2, 0.3])
    drops.draw(torch.tensor([2, 3]), 4, (0, 0))
    resnet(torch.zeros(2, 3, 32, 32))


def test_a_model_without_a_place_for_drop_path_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        with_drop_path(nn.Sequential(nn.Linear(1, 1)), 0.1)
    assert "a Sequential has no place for drop path" in caplog.text
    with pytest.raises(UserError, match="a Linear takes no classifier"):
        with_classifier(nn.Linear(2, 2), 3)


def test_crops_have_torchvisions_distribution_and_follow_from_image_and_step() -> None:
    image = np.broadcast_to(np.arange(100, dtype=np.float32)[:, None, None], (100, 80, 3)).copy()
    crop = RandomCrop((0.35, 1.0), flip=0.5, seed=3)
    views = np.stack([crop(image, 8, 0, row) for row in range(3000)])
    boxes = [RandomResizedCrop.get_params(torch.zeros(3, 100, 80), [0.35, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)]
    expected = np.array([top + height / 2 - 0.5 for top, _, height, _ in boxes])
    found = views[:, 0].mean((1, 2))
    assert found.mean() == pytest.approx(expected.mean(), abs=0.7)
    assert found.std() == pytest.approx(expected.std(), rel=0.06)
    ramp = np.broadcast_to(np.arange(80, dtype=np.float32)[None, :, None], (100, 80, 3)).copy()
    flipped = [bool(view[0, 0, 0] > view[0, 0, -1]) for view in (crop(ramp, 8, 0, row) for row in range(1000))]
    assert np.mean(flipped) == pytest.approx(0.5, abs=0.06)
    assert np.array_equal(crop(image, 8, 5, 9), crop(image, 8, 5, 9))
    assert not np.array_equal(crop(image, 8, 5, 9), crop(image, 8, 6, 9))


def test_samples_come_by_number(scenes: Path, tmp_path: Path) -> None:
    train = samples(scenes, threads=2)
    (batch,) = labelled_batches(str(scenes), image_size=32, batch_size=96)
    assert torch.equal(train.labels, batch.labels)
    rows = [torch.tensor([95, 3]), torch.tensor([], dtype=torch.long), torch.tensor([40])]
    found = list(train.batches(rows))
    assert [of.tolist() for _, of in found] == [[95, 3], [], [40]]
    assert torch.equal(found[0][0], batch.images[[95, 3]])
    assert torch.equal(found[2][0], batch.images[[40]])
    image = np.zeros((8, 8, 3), np.uint8)
    path = shard(tmp_path / "s.tar", {"a.png": png(image), "b.png": b"\x89PNG no", "c.png": png(image), "d.cls": b"0"})
    broken = samples(path, 8)
    assert len(broken.labels) == 3
    assert [of.tolist() for _, of in broken.batches([torch.arange(3)])] == [[0, 2]]
    with pytest.raises(UserError, match="cannot be used"):
        list(broken.batches([torch.ones(30, dtype=torch.long)]))


def stripes(path: Path, count: int) -> str:
    """Images with stripes that lie (class 0) or stand (1), of any phase."""
    members = {}
    for number in range(count):
        wave = np.sin(np.arange(32) * 2 * np.pi / 8 + number)[:, None] * np.ones((32, 32))
        wave = wave if number % 2 == 0 else wave.T
        members[f"{number:03d}.png"] = png((127 + 100 * wave)[..., None].repeat(3, 2).astype(np.uint8))
        members[f"{number:03d}.cls"] = b"%d" % (number % 2)
    return shard(path, members)


def test_it_learns_what_no_linear_layer_can(tmp_path: Path) -> None:
    path = stripes(tmp_path / "s.tar", 64)
    model = timm.create_model("resnet10t", num_classes=0, channels=[16, 16, 32, 32], stem_width=8).eval()
    recipe = FinetuneRecipe((1e-5, 3e-2), epochs=6, batch=16, crop=0.6, held_out=0.25)
    guesses = finetune(model, samples(path), of_test(path), recipe, at_once=9)
    assert float((guesses.ranked[:, 0] == torch.arange(64) % 2).float().mean()) > 0.9
    said = guesses.settings
    assert set(said["accuracy_by_rate"]) == {1e-5, 3e-2}
    assert said["held_out_accuracy"] == max(said["accuracy_by_rate"].values())
    assert said["learning_rate"] == 3e-2
    assert said.items() >= {"layer_decay": 0.75, "label_smoothing": 0.1, "drop_path": 0.1, "train_images": 64}.items()


AUGMENTED = FinetuneRecipe((2e-3,), epochs=1, batch=24, drop_path=0.3)


def _weights(shards: str, at_once: int, recipe: FinetuneRecipe) -> tuple[Tensor, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        guesses, model = tuned(vit(), samples(shards), of_test(shards), recipe, patch)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), guesses.ranked


def test_numbers_follow_from_the_seed_not_from_the_ranks(scenes: Path) -> None:
    """Crops, flips and drop path, in parts of 5 images."""
    weights, ranked = _weights(str(scenes), 256, AUGMENTED)
    assert torch.equal(_weights(str(scenes), 256, AUGMENTED)[0], weights)
    assert not torch.equal(_weights(str(scenes), 256, replace(AUGMENTED, seed=1))[0], weights)
    found = run_ranks(_weights, 3, str(scenes), 5, AUGMENTED)
    for of_rank, _ in found:
        torch.testing.assert_close(of_rank, weights, rtol=1e-3, atol=2e-5)
        assert torch.equal(of_rank, found[0][0])
    agreed = torch.cat([part for _, part in found])[:, 0] == ranked[:, 0]
    assert float(agreed.float().mean()) > 0.97


def test_batch_norm_keeps_its_statistics_and_learns_its_weights(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("resnet10t", num_classes=0).eval()
    _, found = tuned(model, samples(scenes), of_test(scenes), replace(PLAIN, batch=48), monkeypatch)
    assert torch.equal(found.bn1.running_mean, model.bn1.running_mean)
    assert not torch.equal(found.bn1.weight, model.bn1.weight)


def test_what_cannot_be_finetuned_is_refused(scenes: Path, tmp_path: Path) -> None:
    image = png(np.zeros((32, 32, 3), np.uint8))
    alone = shard(tmp_path / "alone.tar", {"a.png": image, "a.cls": b"1", "b.png": image, "b.cls": b"1"})
    with pytest.raises(UserError, match="all 2 images of the training set are of class 1"):
        finetune(vit(), samples(alone), of_test(scenes))
    without = shard(tmp_path / "without.tar", {"a.png": image, "b.png": image, "b.cls": b"1"})
    with pytest.raises(UserError, match="1 of 2 evaluation images have no label"):
        finetune(vit(), samples(without), of_test(scenes))
    few = shard(tmp_path / "few.tar", {"a.png": image, "a.cls": b"0", "b.png": image, "b.cls": b"1"})
    with pytest.raises(UserError, match="each of the 2 classes has 1 training image"):
        finetune(vit(), samples(few), of_test(scenes), FinetuneRecipe((1e-3, 1e-2)))
    with pytest.raises(UserError, match="all 1 heads of fine-tuning diverged, from learning rate 1e"):
        finetune(vit(), samples(scenes), of_test(scenes), replace(PLAIN, learning_rates=(1e30,)))
    for wrong in (
        {"learning_rates": ()},
        {"epochs": 0},
        {"layer_decay": 0.0},
        {"crop": 1.5},
        {"label_smoothing": 1.0},
        {"drop_path": -0.1},
    ):
        with pytest.raises(UserError, match=f"fine-tuning needs.*{next(iter(wrong)).replace('_', '.')}"):
            FinetuneRecipe(**wrong)  # type: ignore[arg-type]
