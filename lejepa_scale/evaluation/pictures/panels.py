"""What a picture shows, before it is drawn: settings in, panels out."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32, UInt8

from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.pictures.curves import Curve
from lejepa_scale.evaluation.pictures.neighbours import Spectrum


@dataclass(frozen=True)
class Settings:
    """images: that are shown. size: of their shorter side in pixels; unset, twice the encoder's own, at most 448. sample:
    images that neighbours and the spectrum are of. mask: whether to look for a foreground. threshold: of it, 0..1; unset,
    Otsu's. finer: how many times finer than the encoder's patches maps are; unset, as many as make 28 places along the
    shorter side, at most 8. Raises UserError for what is out of range."""

    images: int = 8
    size: int | None = None
    sample: int = 500
    mask: bool = True
    threshold: float | None = None
    finer: int | None = None
    seed: int = 0
    batch: int = 64

    def __post_init__(self) -> None:
        if min(self.images, self.sample, self.batch, *(n for n in (self.size, self.finer) if n is not None)) < 1:
            raise UserError(f"a picture needs numbers of at least 1: {self}.")
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise UserError(f"the threshold of the foreground lies between 0 and 1, not at {self.threshold:g}.")


@dataclass
class Shown:
    """One image and its maps, which are coarser than it."""

    key: str
    label: str
    image: UInt8[np.ndarray, "_h _w 3"]
    shared: Float32[np.ndarray, "_r _c 3"] | None = None  # colours by the components of all images
    own: Float32[np.ndarray, "_r _c 3"] | None = None
    foreground: Float32[np.ndarray, "_r _c 3"] | None = None  # NaN: background
    heads: Float32[np.ndarray, "heads _gr _gc"] | None = None  # attention of the class token


@dataclass(frozen=True)
class Thumbnail:
    """One image beside a query. right: whether it has the query's label, where both have one."""

    image: UInt8[np.ndarray, "_s _s 3"]
    label: str
    cosine: float = 1.0
    right: bool | None = None


@dataclass
class Panels:
    """facts: of the encoder and the images, by name. said: how each panel was made, by the panel's name. left_out: which
    panels are not there, and why."""

    title: str
    facts: dict[str, str]
    images: list[Shown]
    rows: list[list[Thumbnail]] = field(default_factory=list)  # a query, then its neighbours
    spectrum: Spectrum | None = None
    curves: list[Curve] = field(default_factory=list)
    said: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
