"""All that a picture shows of one encoder, from the encoder and a set of images. Refuses to draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lejepa_scale.checkpoint.places import Place, place
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.features import extract
from lejepa_scale.evaluation.pictures.curves import curves, metrics_of, run_of
from lejepa_scale.evaluation.pictures.image_maps import add_maps
from lejepa_scale.evaluation.pictures.images import Images, fitted, shown
from lejepa_scale.evaluation.pictures.maps import stride_of
from lejepa_scale.evaluation.pictures.neighbours import neighbours, spectrum
from lejepa_scale.evaluation.pictures.panels import Panels, Settings, Thumbnail
from lejepa_scale.evaluation.subjects import Subject

_THUMBNAIL = 128  # pixels
_NEAREST = 5


def panels(subject: Subject, what: str | Place, images: Images, settings: Settings, device: torch.device) -> Panels:
    """Everything that can be shown. Raises UserError for no images, for images that the encoder takes in no size, and for
    features that are not finite."""
    if not len(images):
        raise UserError("there are no images to show: name shards, or a folder of images, with --shards.")
    model: Any = subject.build().to(device).eval()
    positions = images.drawn(max(settings.sample, settings.images), settings.seed)
    good = list[int]()
    batches = images.squares(sorted(positions), subject.image_size, settings.batch, good)
    found = extract(
        model, batches, device, name="features", pixels=subject.pixels, before_classifier=subject.before_classifier,
        total=len(positions),
    )  # fmt: skip
    rows = found.rows["pooled"]
    if not rows.isfinite().all():
        raise UserError(f"the features of {subject.name} are not finite for some images: there is nothing to show.")
    usable = {position: row for row, position in enumerate(good)}
    chosen = [position for position in positions if position in usable][: settings.images]
    out = Panels(_title(subject, what), _facts(subject, model, rows), [])
    add_maps(out, model, subject, images, chosen, settings, device)
    _add_neighbours(out, images, good, [usable[position] for position in chosen], rows, found.labels)
    _add_curves(out, what)
    return out


def _title(subject: Subject, what: str | Place) -> str:
    """The run's name, of one of ours; else the encoder's."""
    path = place(what) if isinstance(what, str) else what
    if subject.data is None or not isinstance(path, Path):
        return subject.name
    return run_of(path.resolve()).name


def _facts(subject: Subject, model: Any, rows: Float[Tensor, "n e"]) -> dict[str, str]:
    parameters = sum(p.numel() for p in model.parameters())
    stride = stride_of(model)
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__
    return {
        "encoder": name,
        "parameters": f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else f"{parameters:,}",
        "patch" if hasattr(model, "patch_embed") else "stride": f"{stride[0]} x {stride[1]} px",
        "own size": f"{subject.image_size} px",
        "features": f"{rows.shape[1]}",
        "from": subject.where,
    }


# -- pooled features


def _add_neighbours(
    out: Panels,
    images: Images,
    good: Sequence[int],
    queries: Sequence[int],
    rows: Float[Tensor, "n e"],
    labels: Int[Tensor, " n"],
) -> None:
    """The panels of neighbours and of the spectrum, which are of two images at least."""
    if len(rows) < 2:
        out.left_out.append("Neighbours and spectrum: they are of two images at least.")
        return
    found = neighbours(rows, labels, _NEAREST)
    for query in queries:
        row = [_thumbnail(images, good[query])]
        for other, cosine in zip(found.rows[query].tolist(), found.cosines[query].tolist(), strict=True):
            known = min(int(labels[query]), int(labels[other])) >= 0
            right = bool(labels[query] == labels[other]) if known else None
            row.append(_thumbnail(images, good[other], cosine, right))
        out.rows.append(row)
    out.said["neighbours"] = (
        f"The {found.rows.shape[1]} nearest by cosine of pooled features, among {len(rows):,} images drawn at random. Two "
        f"different images have a cosine of {found.mean_cosine:.2f} on average."
    )
    if found.agreement is not None:
        out.said["neighbours"] += (
            f" The nearest one has the same label for {found.agreement:.0%} of the images; chance is {found.chance:.0%}."
        )
        out.facts["nearest neighbour right"] = f"{found.agreement:.0%} (chance {found.chance:.0%})"
    out.facts["mean cosine"] = f"{found.mean_cosine:.2f}"
    out.spectrum = spectrum(rows)
    out.facts["effective rank"] = f"{out.spectrum.effective_rank:.1f} of {out.spectrum.rank_of_gaussian:.1f}"


def _thumbnail(images: Images, position: int, cosine: float = 1.0, right: bool | None = None) -> Thumbnail:
    image = shown(fitted(images.read(position), _THUMBNAIL, (1, 1), square=True))
    return Thumbnail(image, images.name(images.label(position)), cosine, right)


def _add_curves(out: Panels, what: str | Place) -> None:
    path = metrics_of(what)
    if path is None:
        out.left_out.append("Curves: this is no run with a metrics.jsonl, so nothing was logged.")
        return
    out.curves = curves(path)
    if not out.curves:
        out.left_out.append(f"Curves: {path} holds no record that can be shown yet.")
