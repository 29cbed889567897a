"""Images to frozen features, batch by batch."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lejepa_scale.conversion.model import outputs
from lejepa_scale.data.evaluation import Labelled
from lejepa_scale.data.images.photometric import normalize
from lejepa_scale.data.images.pixels import RGB, Pixels
from lejepa_scale.data.masks import Segmented
from lejepa_scale.errors import UserError
from lejepa_scale.progress import counter

B = TypeVar("B", Labelled, Segmented)
T = TypeVar("T")


@dataclass(frozen=True)
class Features:
    """Frozen features of labelled images. Raises UserError where a label is missing or a feature is no number."""

    rows: Float[Tensor, "n e"]  # float32, CPU
    labels: Int[Tensor, " n"]

    def __post_init__(self) -> None:
        expect_labels(self.labels)
        if broken := int((~self.rows.isfinite().all(1)).sum()):
            raise UserError(f"the features of {broken} of {len(self.rows)} images are not finite; nothing was scored.")


def expect_labels(labels: Int[Tensor, "*n"]) -> None:
    """Raises UserError where one is missing."""
    if (labels < 0).any():
        raise UserError(
            f"{int((labels < 0).sum())} of {len(labels)} evaluation images have no label. Shards need a .cls "
            "member per image: `lejepa shards make` writes it for images that lie in one folder per class."
        )


KINDS = (
    "pooled (what the encoder's own pooling gives), cls (the class token), patches (the mean of the patches' tokens, or of "
    "the last map), cls+patches (both); with -N, as in cls-2 or cls+patches-4, class tokens (or means) of the last N blocks "
    "side by side, each behind the last normalization, and for cls+patches the mean of the last block's patches alone, as "
    "DINOv2's linear evaluation has it"
)
_KIND = re.compile(r"(pooled|cls|patches|cls\+patches)(?:-([1-9][0-9]*))?")


@dataclass(frozen=True)
class Kind:
    """Which of an encoder's outputs are its features. Raises UserError for a name that is none of KINDS."""

    name: str

    def __post_init__(self) -> None:
        if _KIND.fullmatch(self.name) is None or (self.what == "pooled" and self.name != "pooled"):
            raise UserError(f"--features {self.name} is none of: {KINDS}.")

    @property
    def what(self) -> str:
        return self._parts[0]

    @property
    def blocks(self) -> int:
        """How many of the last."""
        return int(self._parts[1] or 1)

    @property
    def _parts(self) -> tuple[str, str | None]:
        found = _KIND.fullmatch(self.name)
        assert found is not None
        return found[1], found[2]


POOLED = Kind("pooled")


@dataclass(frozen=True)
class Outputs:
    """What a model of timm's makes of images."""

    pooled: Float[Tensor, "b e"]
    prefix: list[Float[Tensor, "b _p d"]]  # class and register tokens of the last blocks, the last one last
    patches: list[Float[Tensor, "b _l _d"]]  # of the same blocks, or of the last map

    def of(self, kind: Kind) -> Float[Tensor, "b _e"]:
        if kind.what == "pooled":
            return self.pooled
        classes = [tokens[:, 0] for tokens in self.prefix[-kind.blocks :]]
        means = [tokens.mean(1) for tokens in self.patches[-kind.blocks :]]
        return torch.cat({"cls": classes, "patches": means, "cls+patches": [*classes, *means[-1:]]}[kind.what], 1)


def outputs_of(
    model: Any, images: Float[Tensor, "b c h w"], kinds: Sequence[Kind] = (POOLED,), *, before_classifier: bool = False
) -> Outputs:
    """All that `kinds` need. before_classifier: the pooled features are what a classifier at the end would be given. Raises
    UserError for a kind that the model does not have."""
    last = max(kind.blocks for kind in kinds)
    tokens = model.forward_features(images)
    pooled = model.forward_head(tokens, pre_logits=True) if before_classifier else model.forward_head(tokens)
    if all(kind == POOLED for kind in kinds):
        return Outputs(pooled, [], [])
    name, prefix = type(model).__name__, int(getattr(model, "num_prefix_tokens", 0))
    if not isinstance(tokens, Tensor):
        raise UserError(f"a {name} has several maps at its end: its features are pooled alone.")
    if any(kind.what.startswith("cls") for kind in kinds) and not (prefix and tokens.ndim == 3):
        raise UserError(f"a {name} has no class token: use --features pooled or patches.")
    if last > len(getattr(model, "blocks", [None])):
        raise UserError(f"this {name} has {len(getattr(model, 'blocks', [None]))} block(s), not {last} for --features.")
    if last == 1:
        _, patches = outputs(model, images) if tokens.ndim != 3 else (None, tokens[:, prefix:])
        assert patches is not None
        return Outputs(pooled, [tokens[:, :prefix]] if tokens.ndim == 3 else [], [patches])
    found = model.forward_intermediates(
        images, indices=last, norm=True, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    parts = [part if isinstance(part, tuple) else (part, part[:, :0]) for part in found]
    return Outputs(pooled, [classes for _, classes in parts], [patches for patches, _ in parts])


@torch.no_grad()
def extract(
    model: nn.Module,
    batches: Iterable[Labelled],
    device: torch.device,
    kinds: Sequence[Kind] = (POOLED,),
    *,
    name: str = "features",
    pixels: Pixels = RGB,
    before_classifier: bool = False,
    total: int | None = None,
) -> Extracted:
    """Features of every image by `model` (timm's, in eval mode, on `device`), at the size the batches have, normalized as
    `pixels` says. total: images, for the progress. Raises UserError for a kind that the model does not have, and for images
    of a size that it does not take."""
    rows: dict[str, list[Tensor]] = {kind.name: [] for kind in kinds}
    labels, keys = list[Tensor](), list[str]()

    def encode(images: Float[Tensor, "b c h w"]) -> Outputs:
        return outputs_of(model, images, kinds, before_classifier=before_classifier)

    asked = ", ".join(kind.name for kind in kinds)
    for found, batch in encoded(encode, batches, device, asked=asked, name=name, pixels=pixels, total=total):
        for kind in kinds:
            rows[kind.name].append(found.of(kind).float().cpu())
        labels.append(batch.labels)
        keys += batch.keys
    empty = torch.zeros(0, dtype=torch.long)
    return Extracted(
        {k: torch.cat(v) if v else torch.zeros(0, 0) for k, v in rows.items()}, torch.cat([empty, *labels]), keys
    )


def encoded(
    encode: Callable[[Tensor], T],
    batches: Iterable[B],
    device: torch.device,
    *,
    asked: str,
    name: str,
    pixels: Pixels,
    total: int | None = None,
) -> Generator[tuple[T, B], None, None]:
    """What `encode` makes of the images of every batch, normalized as `pixels` says, on `device`; and the batch. asked: what
    that is, for messages. total: images, for the progress. Raises UserError for images of a size that the encoder does not
    take, and for too many at once."""
    with counter(name, unit="image", total=total) as progress:
        for batch in batches:
            images = normalize(batch.images.to(device), pixels)
            try:
                with torch.no_grad():
                    found = encode(images)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"{len(images)} images at once are too many for {device}: use a smaller --batch."
                ) from error
            except (AssertionError, RuntimeError, TypeError, ValueError) as error:  # of many kinds in timm
                side, said = images.shape[-1], (str(error).splitlines() or [type(error).__name__])[0]
                raise UserError(
                    f"{name}: the encoder refuses images of {side} x {side} pixels, or has no {asked} features: {said}"
                ) from error
            yield found, batch
            progress.update(len(batch.keys))


def patch_tokens(model: Any, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b _l _d"]:
    """The tokens of the patches behind the last block, or the places of the last map, row by row. Raises UserError for a
    model that has none."""
    try:
        _, patches = outputs(model, images)
    except IndexError:  # of a model whose features are pooled already
        patches = None
    if patches is None:
        raise UserError(
            f"a {type(model).__name__} has no tokens of patches, nor one map at its end: the protocols attentive and "
            "segmentation need an encoder that has."
        )
    return patches


@dataclass(frozen=True)
class Extracted:
    """Features of a set of images, by kind, in stored order."""

    rows: dict[str, Float[Tensor, "n _e"]]  # float32, CPU
    labels: Int[Tensor, " n"]  # -1 where unknown
    keys: list[str]

    def labelled(self, kind: str) -> Features:
        """Raises UserError as Features does."""
        return Features(self.rows[kind], self.labels)


def raw_pixels(batches: Iterable[Labelled], side: int = 32, pixels: Pixels = RGB) -> Extracted:
    """The baseline without an encoder: what the encoder is given (normalized pixels, so that a cosine does not measure
    brightness), averaged down to at most side x side, flattened."""
    rows, labels, keys = list[Tensor](), list[Tensor](), list[str]()
    for batch in batches:
        x = normalize(batch.images, pixels)
        if x.shape[-1] > side:
            x = F.interpolate(x, size=(side, side), mode="area")
        rows.append(x.flatten(1))
        labels.append(batch.labels)
        keys += batch.keys
    return Extracted({POOLED.name: torch.cat(rows)}, torch.cat(labels), keys)
