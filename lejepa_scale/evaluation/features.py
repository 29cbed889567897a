"""Images to frozen features, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Real
from torch import Tensor
from tqdm import tqdm

from lejepa_scale.data.images.photometric import normalize
from lejepa_scale.data.images.pixels import RGB, Pixels
from lejepa_scale.errors import UserError
from lejepa_scale.model import Encoder

Batches = Iterable[tuple[Real[Tensor, "_b _c _s _s"], Int[Tensor, " _b"]]]


@dataclass(frozen=True)
class Features:
    """Frozen features of labelled images. Raises UserError where a label is missing or a feature is no number."""

    rows: Float[Tensor, "n e"]  # float32, CPU
    labels: Int[Tensor, " n"]

    def __post_init__(self) -> None:
        if (self.labels < 0).any():
            raise UserError(
                f"{int((self.labels < 0).sum())} of {len(self.labels)} evaluation images have no label. Shards need a .cls "
                "member per image: `lejepa shards make` writes it for images that lie in one folder per class."
            )
        if broken := int((~self.rows.isfinite().all(1)).sum()):
            raise UserError(f"the features of {broken} of {len(self.rows)} images are not finite; nothing was scored.")


@torch.no_grad()
def extract(
    encoder: Encoder, batches: Batches, device: torch.device, name: str = "features", pixels: Pixels = RGB
) -> Features:
    """Pooled features of every image, at the size the batches have, normalized as `pixels` says. Raises UserError where an
    image has no label."""
    encoder = encoder.to(device).eval()
    rows, labels = [], []
    for images, label in tqdm(batches, desc=name, unit="batch", leave=False, mininterval=1.0):
        rows.append(encoder([normalize(images.to(device), pixels)])[0].float().cpu())
        labels.append(label)
    return Features(torch.cat(rows), torch.cat(labels))


def raw_pixels(batches: Batches, side: int = 32, pixels: Pixels = RGB) -> Features:
    """The baseline without an encoder: what the encoder is given (normalized pixels, so that a cosine does not measure
    brightness), averaged down to at most side x side, flattened. Raises UserError where an image has no label."""
    rows, labels = [], []
    for images, label in batches:
        x = normalize(images, pixels)
        if x.shape[-1] > side:
            x = F.interpolate(x, size=(side, side), mode="area")
        rows.append(x.flatten(1))
        labels.append(label)
    return Features(torch.cat(rows), torch.cat(labels))
