"""What is read, and the views that are made of it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, PlainSerializer, ValidationInfo, field_validator, model_validator

from lejepa_scale.addresses import Address, is_remote
from lejepa_scale.config.schema.section import FilePath, NonNegative, Positive, Probability, Section

Interval = tuple[float, float]
Shards = Annotated[str, AfterValidator(Address), PlainSerializer(str, return_type=str)]  # written without secrets


class Source(Section):
    """One source of a mixture."""

    shards: list[Shards] = Field(description="tar shards: paths or URLs, braces allowed")
    weight: float = Field(1.0, gt=0, description="share of the samples drawn from this source")
    image_key: str = Field(
        "",
        pattern=r"^[^/:]*$",
        description="ending of the member that is the image, several by preference as left.jpg;left.png; empty: any image's",
    )
    label_key: str = Field(
        "cls",
        pattern=r"^[^/:;]+(:[^/:;]+)?$",
        description="ending of the member that is the label, a number or a name; with a path, as json:category.id, in JSON",
    )
    range: Interval | list[Interval] | None = Field(
        None,
        description="[low, high] of the stored values, or a list with that of each channel; unset: 8-bit images",
    )

    @field_validator("shards", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _range_is_an_interval(self) -> Source:
        for low, high in self.ranges or ():
            if not low < high:
                raise ValueError(f"range must satisfy low < high, got [{low:g}, {high:g}]")
        return self

    @property
    def ranges(self) -> tuple[Interval, ...] | None:
        """One interval, or one of each channel."""
        if self.range is None or isinstance(self.range, list):
            return None if self.range is None else tuple(self.range)
        return (self.range,)


class ViewGroup(Section):
    """Views of one size. Each key may be given alone; the others keep the group's defaults."""

    count: NonNegative = Field(description="views per image")
    size: Positive = Field(description="side in pixels")
    scale: tuple[float, float] = Field(description="crop area as a fraction of the image: [low, high]")

    @model_validator(mode="after")
    def _scale_is_an_interval(self) -> ViewGroup:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"scale must satisfy 0 < low <= high <= 1, got [{low}, {high}]")
        return self


class Views(Section):
    """Random crops of every image. The mean of the global views is what every view predicts."""

    global_: ViewGroup = Field(
        ViewGroup(count=2, size=224, scale=(0.3, 1.0)), alias="global", description="large crops, at least one"
    )
    local: ViewGroup = Field(ViewGroup(count=6, size=98, scale=(0.05, 0.3)), description="small crops, or none")

    @field_validator("global_", "local", mode="before")
    @classmethod
    def _over_the_default(cls, value: Any, info: ValidationInfo) -> Any:
        """What a file leaves out of a group is the group's own default, which ViewGroup alone does not know."""
        if not isinstance(value, dict):
            return value
        default: ViewGroup = cls.model_fields[str(info.field_name)].default
        return {**default.model_dump(), **value}

    @model_validator(mode="after")
    def _a_target_exists(self) -> Views:
        if self.global_.count < 1:
            raise ValueError("global.count must be at least 1: the global views' mean is what every view predicts")
        if self.global_.count + self.local.count < 2:
            raise ValueError("at least two views are needed in all: with one, the prediction loss is always zero")
        return self


class Augment(Section):
    """Photometric changes, drawn for each view; the defaults are those of LeJEPA (arXiv 2511.08544, experiments)."""

    flip: Probability = Field(0.5, description="probability of a horizontal flip")
    jitter: Probability = Field(0.8, description="probability of colour jitter: the next four, in random order")
    brightness: float = Field(0.4, ge=0, description="jitter: factor in [1 - brightness, 1 + brightness], from 0 up")
    contrast: float = Field(0.4, ge=0, description="jitter: factor of the difference to the mean gray, likewise")
    saturation: float = Field(0.2, ge=0, description="jitter: factor of the difference to gray, likewise")
    hue: float = Field(0.1, ge=0, le=0.5, description="jitter: turn in [-hue, hue]; 0.5 is half of the colour circle")
    grayscale: Probability = Field(0.2, description="probability of losing all colour")
    blur: Probability = Field(0.5, description="probability of Gaussian blur, sigma in [0.1, 2]")
    solarize: Probability = Field(0.2, description="probability of inverting values >= 128")


class Data(Section):
    """Shards of images, how they are read, and the views made of them."""

    shards: list[Source] = Field(
        min_length=1,
        description="tar shards: a path or URL with braces, a list of those, or a mixture [{shards, weight}, ...]",
    )
    exif: bool = Field(
        True, description="turn images as their EXIF or TIFF orientation says; false: as they are stored"
    )
    channels: Positive = Field(3, description="bands of every image, which the encoder takes; 3: RGB")
    mean: tuple[float, ...] = Field(
        (0.485, 0.456, 0.406),
        description="of each channel, as a share of its range, subtracted; default: ImageNet's, as timm's weights expect",
    )
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.229, 0.224, 0.225), description="standard deviation of each channel, likewise, divided by"
    )
    workers: NonNegative = Field(0, description="decoding processes per rank; 0: in the training process")
    prefetch: Positive = Field(2, description="batches each worker prepares ahead")
    shuffle_block: Positive = Field(
        16384, description="samples mixed among each other, shards being in random order; any size, no memory"
    )
    index_dir: FilePath | None = Field(
        None, description="where indexes are written; unset: beside the shards, else in the user's cache"
    )
    cache_dir: FilePath | None = Field(
        None, description="a disk of the node for whole copies of remote shards; unset: samples come by range request"
    )
    cache_gb: float | None = Field(None, gt=0, description="size of that cache in 10^9 bytes; unset: no limit")
    read_timeout: float = Field(
        30.0, gt=0, description="seconds for up to 4 MiB of a remote shard, and without a sign of life of a worker"
    )
    retries: NonNegative = Field(5, description="failures in a row before a remote shard stops the run")
    max_pixels: Positive = Field(
        80_000_000,
        le=178_000_000,
        description="larger images are faults; read from the header (Pillow's own limit: 178e6)",
    )
    max_faults: Positive = Field(16, description="stop after this many samples in a row that cannot be used")
    log_keys: bool = Field(False, description="write which samples every rank consumed to keys/ in the run directory")
    views: Views = Field(Views(), description="crops")
    augment: Augment = Field(Augment(), description="photometric changes")

    @field_validator("shards", mode="before")
    @classmethod
    def _as_mixture(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [{"shards": value}]
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            return [{"shards": value}]
        return value

    def remote_shards(self) -> list[str]:
        """Patterns of all sources that are fetched from elsewhere."""
        return [shard for source in self.shards for shard in source.shards if is_remote(shard)]
