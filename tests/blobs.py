"""Features of images that are not there: a cloud around a centre for each class."""

from __future__ import annotations

import torch

from lejepa_scale.evaluation.features import Features


def blobs(count: int, seed: int, classes: int = 6, width: int = 12, spread: float = 1.5) -> Features:
    """Rows [count, width] around the same centres for every seed; labels are 1, 3, 5, ..."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return Features(centres[labels] + spread * torch.randn(count, width, generator=generator), 2 * labels + 1)


def uneven(found: Features, offset: float) -> Features:
    """The same with columns of scales from 0.3 to 3 around `offset`."""
    return Features(found.rows * torch.logspace(-0.5, 0.5, found.rows.shape[1]) + offset, found.labels)
