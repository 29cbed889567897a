"""Features and their spectrum against known answers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lejepa_scale.data import Pixels
from lejepa_scale.data.evaluation import labelled_batches
from lejepa_scale.data.images.pixels import MEAN, STD
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation import Features, extract, raw_pixels
from lejepa_scale.evaluation.spectrum import effective_rank
from lejepa_scale.evaluation.subjects import of_encoder
from lejepa_scale.model import Encoder


def test_effective_rank_of_known_spectra() -> None:
    rows = torch.randn(4000, 10)
    assert effective_rank(rows) == pytest.approx(10, rel=0.01)
    assert effective_rank(rows[:, :1] @ torch.randn(1, 10)) == pytest.approx(1, abs=1e-3)
    assert effective_rank(rows + 100) == pytest.approx(10, rel=0.01)  # centred
    assert math.isnan(effective_rank(rows * torch.inf))


def test_extraction_and_raw_pixels(scenes: Path) -> None:
    encoder = Encoder("vit_nano", image_size=32, options={"depth": 1}).eval()
    batches = list(labelled_batches([str(scenes)], image_size=32, batch_size=40))
    features = extract(of_encoder(encoder, "encoder", 32, Pixels()).build(), batches, torch.device("cpu"))
    assert features.rows["pooled"].shape == (96, 128)
    assert features.labels.tolist() == [i % 10 for i in range(96)]
    assert len(set(features.keys)) == 96
    pixels = raw_pixels(batches, side=8).rows["pooled"]
    assert pixels.shape == (96, 3 * 64)
    patch = float(batches[0].images[5, 1, 8:12, 12:16].float().mean() / 255)
    assert pixels[5].view(3, 8, 8)[1, 2, 3] == pytest.approx((patch - MEAN[1]) / STD[1], abs=1e-5)


def test_images_without_labels_are_refused() -> None:
    with pytest.raises(UserError, match="1 of 2 evaluation images have no label"):
        Features(torch.randn(2, 3), torch.tensor([0, -1]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_no_numbers_are_refused(value: float) -> None:
    with pytest.raises(UserError, match="features of 1 of 2 images are not finite"):
        Features(torch.tensor([[1.0, value], [0.0, 1.0]]), torch.tensor([0, 1]))
