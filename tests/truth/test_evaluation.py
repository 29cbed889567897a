"""Scores of frozen features against scikit-learn, timm and NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import torchvision.transforms.v2.functional as reference
from scipy import stats
from sklearn.decomposition import PCA

from lejepa_scale.data import Pixels
from lejepa_scale.data.evaluation import Labelled
from lejepa_scale.evaluation import Kind, extract, isotropy, raw_pixels
from lejepa_scale.evaluation.isotropy import first_four_moments
from lejepa_scale.evaluation.pca import pca_maps
from lejepa_scale.evaluation.spectrum import effective_rank
from lejepa_scale.evaluation.subjects import of_encoder
from lejepa_scale.model import Encoder
from lejepa_scale.objective import SIGReg

IMAGENET = list(timm.data.IMAGENET_DEFAULT_MEAN), list(timm.data.IMAGENET_DEFAULT_STD)


def rank_me(rows: np.ndarray) -> float:
    """RankMe (arXiv 2210.02885): exp of the entropy of singular values over their sum; of centred rows here."""
    values = np.linalg.svd(rows - rows.mean(0), compute_uv=False)
    p = values / values.sum()
    return float(np.exp(-np.sum(p * np.log(np.maximum(p, 1e-30)))))


def test_effective_rank_is_rank_me() -> None:
    rows = np.random.default_rng(0).normal(size=(200, 12)) * np.geomspace(1, 0.01, 12) + 3
    assert effective_rank(torch.from_numpy(rows)) == pytest.approx(rank_me(rows), rel=1e-6)
    orthogonal = torch.cat([torch.diag(torch.tensor([4.0, 2.0, 2.0])), -torch.diag(torch.tensor([4.0, 2.0, 2.0]))])
    assert effective_rank(orthogonal) == pytest.approx(2**1.5)  # shares 1/2, 1/4, 1/4: 3/2 bits


def test_colours_are_principal_components_between_percentiles() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, 9, 7, 8)) @ (rng.normal(size=(8, 8)) * np.geomspace(8, 0.1, 8)[:, None]) + 5
    rows = features.reshape(-1, 8)
    model = PCA(3).fit(rows)
    axes = model.components_
    axes = axes * np.sign(axes[np.arange(3), np.abs(axes).argmax(1)])[:, None]
    projected = (rows - rows.mean(0)) @ axes.T
    low, high = np.percentile(projected, [2, 98], axis=0)
    expected = np.clip((projected - low) / (high - low), 0, 1).reshape(2, 9, 7, 3)
    np.testing.assert_allclose(pca_maps(torch.from_numpy(features)).numpy(), expected, atol=1e-4)


def _batches(images: torch.Tensor, size: int) -> list[Labelled]:
    labels, keys = torch.arange(len(images)), [str(i) for i in range(len(images))]
    cuts = [slice(i, i + size) for i in range(0, len(images), size)]
    return [Labelled(images[cut], labels[cut], keys[cut]) for cut in cuts]


def test_extracted_features_are_timms_in_evaluation_mode() -> None:
    encoder = Encoder("vit_nano", image_size=32, drop_path=0.9, drop_path_uniform=True, options={"depth": 2}).train()
    plain = timm.create_model(**{**encoder.timm_arguments, "drop_path_rate": 0.0}).eval()
    plain.load_state_dict(encoder.backbone.state_dict())
    images = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    model = of_encoder(encoder, "encoder", 32, Pixels()).build()
    found = extract(model, _batches(images, 4), torch.device("cpu"))
    with torch.no_grad():
        expected = plain(reference.normalize(images / 255, *IMAGENET))
    torch.testing.assert_close(found.rows["pooled"], expected, rtol=1e-4, atol=1e-5)
    assert found.labels.tolist() == list(range(7))


@pytest.mark.parametrize(
    "name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224", "resnet10t"]
)
def test_kinds_of_features_are_timms_tokens(name: str) -> None:
    """As DINOv2's linear evaluation joins them: class tokens of the last blocks, then the mean of the last one's patches."""
    arguments = {"depth": 3, "img_size": 112} if "resnet" not in name else {}
    model = timm.create_model(name, num_classes=0, **arguments).eval()
    images = torch.randint(0, 256, (3, 3, 112, 112), dtype=torch.uint8)
    inputs = reference.normalize(images / 255, *IMAGENET)
    names = (
        ["pooled", "patches"]
        if "resnet" in name
        else ["pooled", "cls", "patches", "cls+patches", "cls-2", "cls+patches-3"]
    )
    with torch.no_grad():
        found = extract(model, _batches(images, 2), torch.device("cpu"), [Kind(n) for n in names]).rows
        tokens = model.forward_features(inputs)
        expected = {"pooled": model(inputs)}
        if "resnet" in name:
            expected["patches"] = tokens.mean((2, 3))
        else:
            prefix = model.num_prefix_tokens
            expected |= {"cls": tokens[:, 0], "patches": tokens[:, prefix:].mean(1)}
            expected["cls+patches"] = torch.cat([expected["cls"], expected["patches"]], 1)
            blocks: list[torch.Tensor] = []
            for block in model.blocks:
                block.register_forward_hook(lambda *given: blocks.append(model.norm(given[2])[:, 0]))
            model.forward_features(inputs)
            expected["cls-2"] = torch.cat(blocks[1:3], 1)
            expected["cls+patches-3"] = torch.cat([*blocks[:3], expected["patches"]], 1)
    for kind in names:
        torch.testing.assert_close(
            found[kind], expected[kind], rtol=1e-4, atol=1e-4, msg=lambda text, k=kind: f"{k}: {text}"
        )


def test_raw_pixels_are_means_on_a_grid_of_32() -> None:
    images = torch.randint(0, 256, (3, 3, 96, 96), dtype=torch.uint8)
    means = images.double().numpy().reshape(3, 3, 32, 3, 32, 3).mean((3, 5)) / 255
    mean, std = (np.array(v)[:, None, None] for v in IMAGENET)
    rows = raw_pixels(_batches(images, 3)).rows["pooled"]
    np.testing.assert_allclose(rows.numpy(), ((means - mean) / std).reshape(3, -1), atol=1e-5)


def test_the_first_four_moments_are_weighted_by_their_variances() -> None:
    """Of x^k at N(0, 1), from SciPy's moments: E x^2k - (E x^k)^2."""
    x = np.random.default_rng(0).gamma(2.0, size=(50, 3)) - 1
    expected = np.zeros(3)
    for k in range(1, 5):
        mean = stats.norm.moment(k)
        expected += 50 * ((x**k).mean(0) - mean) ** 2 / (stats.norm.moment(2 * k) - mean**2)
    np.testing.assert_allclose(first_four_moments(torch.from_numpy(x)).numpy(), expected, rtol=1e-12)


def test_isotropy_divides_by_one_number() -> None:
    """SciPy's statistic along the same directions, of rows that are centred and divided by the root of their mean square."""
    rows = np.random.default_rng(0).normal(size=(300, 6)) * np.linspace(1, 9, 6) + 3
    centred = rows - rows.mean(0)
    directions = SIGReg(num_slices=256).directions(0, 6, torch.device("cpu"), torch.float64).numpy()
    projected = centred / np.sqrt((centred**2).mean()) @ directions.T
    values = [stats.cramervonmises(column, "norm").statistic for column in projected.T]
    found = {row.name: row for row in isotropy(torch.from_numpy(rows))}["Cramer-von Mises"]
    assert (found.mean, found.worst) == pytest.approx((np.mean(values), np.max(values)), rel=1e-9)
