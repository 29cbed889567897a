"""Panels as one HTML file that needs nothing beside it, and no network."""

from __future__ import annotations

import base64
import html
import io
import time
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from lejepa_scale.evaluation.pictures.chart import Line, chart
from lejepa_scale.evaluation.pictures.images import heat, overlaid, stretched
from lejepa_scale.evaluation.pictures.panels import Panels, Shown, Thumbnail
from lejepa_scale.evaluation.pictures.style import SCRIPT, STYLE

_QUALITY = 90  # of JPEGs
_LARGE = 160  # pixels: such images are shown one beside its maps, smaller ones in two columns


def page(panels: Panels, command: str) -> str:
    """The whole document."""
    parts = [
        _section(
            "What patches see",
            "The features of every patch, projected on their first three principal components and shown as red, green and "
            "blue: like colours are like features. With the components of <b>all images</b> a colour means the same in "
            "each; those of <b>this image</b> show more within it"
            + ("; the <b>foreground</b> has components of its own" if "foreground" in panels.said else "")
            + ". A click enlarges.",
            "colours follow objects and their parts, with clear borders, and the same kind of thing has the same colour in "
            "several images.",
            "one flat colour (collapse); the same gradient or rings in every image (positions, not content); speckle; "
            "colours that follow brightness alone, as an untrained encoder's do.",
            [panels.said.get("maps", ""), panels.said.get("foreground", "")],
            _maps(panels.images),
        )
    ]
    if any(image.heads is not None for image in panels.images):
        parts.append(
            _section(
                "What the class token attends to",
                "One row of softmax(q k<sup>T</sup> / &radic;d): how much the class token takes from each patch. First the "
                "mean over heads, laid over the image; then every head.",
                "heads differ, and most of them lie on objects.",
                "the same even haze in all heads, numbers near 1; or a few single bright patches in empty background, which "
                "registers cure (arXiv 2309.16588).",
                [panels.said.get("attention", "")],
                _strips([_heads(image) for image in panels.images if image.heads is not None]),
            )
        )
    if panels.rows:
        parts.append(
            _section(
                "Nearest neighbours",
                "Left an image, beside it those that the encoder finds most alike, with the cosine of their features. Where "
                "there are labels, a green frame is the same label, a red one another.",
                "neighbours share what the image shows, and cosines spread: near ones high, others near 0.",
                "neighbours share colour or background alone; every cosine is close to 1, for strangers too; one image is "
                "everybody's neighbour.",
                [panels.said.get("neighbours", "")],
                f'<div class="rows">{"".join(_row(row) for row in panels.rows)}</div>',
            )
        )
    if panels.spectrum is not None:
        parts.append(_spectrum(panels))
    if panels.curves:
        parts.append(_curves(panels))
    left_out = "".join(f"<li>{html.escape(reason)}</li>" for reason in panels.left_out)
    if left_out:
        parts.append(f'<section class="left-out"><h2>Not shown</h2><ul>{left_out}</ul></section>')
    facts = "".join(
        f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in panels.facts.items() if v
    )
    head = (
        f'<header><p class="kicker">lejepa picture</p><h1>{html.escape(panels.title)}</h1><dl>{facts}</dl></header>'
        f"<main>{''.join(parts)}</main>"
        f"<footer><p>{time.strftime('%Y-%m-%d')}</p><code>{html.escape(command)}</code></footer>"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{html.escape(panels.title)}</title><style>{STYLE}</style></head><body>{head}"
        f'<dialog id="large"><img alt=""><p></p></dialog><script>{SCRIPT}</script></body></html>\n'
    )


def _section(title: str, about: str, healthy: str, unhealthy: str, made: Sequence[str], body: str) -> str:
    how = " ".join(html.escape(text) for text in made if text)
    return (
        f'<section><h2>{title}</h2><p class="about">{about}</p>'
        f'<ul class="signs"><li class="good"><b>Healthy:</b> {healthy}</li>'
        f'<li class="bad"><b>Unhealthy:</b> {unhealthy}</li></ul>'
        f'{body}<p class="made">{how}</p></section>'
    )


# -- images


def as_png(pixels: UInt8[np.ndarray, "h w _c"]) -> str:
    """A data: address of it."""
    return _address(pixels, "png")


def _address(pixels: UInt8[np.ndarray, "h w _c"], kind: str) -> str:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **({"quality": _QUALITY} if kind == "jpeg" else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"


def _tile(address: str, caption: str, shape: Sequence[int], kind: str = "") -> str:
    """shape: height and width of the image that it stands for."""
    text = html.escape(caption)
    return (
        f'<figure class="{kind}"><img loading="lazy" src="{address}" alt="{text}" '
        f'style="aspect-ratio: {shape[1]} / {shape[0]}"><figcaption>{text}</figcaption></figure>'
    )


def bytes_of(colours: Float32[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w _c"]:
    """0..1 as 0..255; with a fourth band, transparent where there is no number, if there is such a place."""
    nothing = np.isnan(colours).any(-1)
    out = (255 * np.nan_to_num(colours).clip(0, 1)).round().astype(np.uint8)
    return np.dstack([out, np.where(nothing, 0, 255).astype(np.uint8)]) if nothing.any() else out


def _maps(images: Sequence[Shown]) -> str:
    rows = []
    for image in images:
        shape = image.image.shape
        tiles = [_tile(_address(image.image, "jpeg"), image.label or "image", shape, "photo")]
        for name, colours in (
            ("all images", image.shared),
            ("this image", image.own),
            ("foreground", image.foreground),
        ):
            if colours is not None:
                tiles.append(_tile(as_png(bytes_of(colours)), name, shape, "map"))
        if image.heads is not None:
            tiles.append(_mean(image, "attention"))
        ratio = max(0.5, shape[1] / shape[0])
        rows.append(f'<div class="strip" style="--n: {len(tiles)}; --ratio: {ratio:.3f}">{"".join(tiles)}</div>')
    toggle = '<label class="toggle"><input type="checkbox" id="exact"> show places as squares</label>'
    large = min(min(image.image.shape[:2]) for image in images) >= _LARGE
    return toggle + _strips(rows, "large" if large else "")


def _strips(strips: Sequence[str], kind: str = "") -> str:
    return f'<div class="strips {kind}">{"".join(strips)}</div>'


def _mean(image: Shown, name: str) -> str:
    assert image.heads is not None
    mean = image.heads.mean(0)
    return _tile(_address(overlaid(image.image, mean), "jpeg"), f"{name} {_peak(mean)}", image.image.shape, "photo")


def _heads(image: Shown) -> str:
    assert image.heads is not None
    tiles = [_mean(image, "mean")]
    for number, head in enumerate(image.heads):
        tiles.append(_tile(as_png(heat(stretched(head))), f"{number + 1} {_peak(head)}", image.image.shape, "map"))
    return f'<div class="heads">{"".join(tiles)}</div>'


def _peak(weights: Float32[np.ndarray, "_h _w"]) -> str:
    """The largest in units of their mean."""
    return f"x{float(weights.max()) / max(float(weights.mean()), 1e-12):.1f}"


def _row(row: Sequence[Thumbnail]) -> str:
    query, *others = row
    tiles = [_tile(_address(query.image, "jpeg"), query.label or "image", query.image.shape, "query")]
    for one in others:
        kind = {True: "right", False: "wrong", None: ""}[one.right]
        caption = f"{one.cosine:.2f}" + (f" · {one.label}" if one.label else "")
        tiles.append(_tile(_address(one.image, "jpeg"), caption, one.image.shape, kind))
    return f'<div class="row">{"".join(tiles)}</div>'


# -- charts


def _spectrum(panels: Panels) -> str:
    found = panels.spectrum
    assert found is not None
    floor = max(found.shares[0], found.of_gaussian[0]) * 1e-8  # below it there is rounding alone
    lines = [
        Line(name, range(1, len(values) + 1), [max(v, floor) for v in values], kind)
        for name, values, kind in (("Gaussian", found.of_gaussian, "other"), ("features", found.shares, "main"))
    ]
    drawn = chart(lines, x_label="number of the eigenvalue", logarithmic=True)
    legend = '<p class="legend"><span class="main">features</span><span class="other">isotropic Gaussian</span></p>'
    numbers = (
        f'<div class="numbers"><div><b>{found.effective_rank:.1f}</b><span>effective rank</span></div>'
        f"<div><b>{found.rank_of_gaussian:.1f}</b><span>of the Gaussian</span></div>"
        f"<div><b>{found.width}</b><span>width</span></div></div>"
    )
    return _section(
        "Spectrum",
        "Eigenvalues of the covariance of pooled features, as shares of the whole variance, largest first. Grey is an "
        "isotropic Gaussian of the same width with the same number of samples, whose curve bends too.",
        "a smooth decline without a cliff; an effective rank that is a good part of the Gaussian's. (LeJEPA asks the output "
        "of the projector to be an isotropic Gaussian, not these features.)",
        "a cliff after few eigenvalues: the features use few directions (dimensional collapse).",
        [f"Of {found.samples:,} images; the effective rank is exp of the entropy of the singular values (RankMe)."],
        f'<div class="chart-row"><div class="chart">{legend}{drawn}</div>{numbers}</div>',
    )


def _curves(panels: Panels) -> str:
    charts = []
    for curve in panels.curves:
        drawn = chart([Line(curve.title, curve.steps, curve.values)], x_label="step", logarithmic=curve.logarithmic)
        last = f"{curve.values[-1]:.4g}"
        charts.append(f'<div class="chart"><h3>{html.escape(curve.title)} <b>{last}</b></h3>{drawn}</div>')
    steps = max(curve.steps[-1] for curve in panels.curves)
    most = max(len(curve.steps) for curve in panels.curves)
    return _section(
        "Curves of the run",
        "What the run has logged; the number is the last value.",
        "losses fall and settle, the effective rank stays high, the norm of the gradient is steady.",
        "a prediction loss near 0 with a falling rank (collapse), spikes that do not come back, a SIGReg loss that grows.",
        [f"Of metrics.jsonl: {most:,} {'record' if most == 1 else 'records'}, up to step {steps:,}."],
        f'<div class="charts">{"".join(charts)}</div>',
    )
