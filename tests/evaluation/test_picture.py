"""`lejepa picture`: what is on the page and in the figure, of runs and others, against computations from outside."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import small_config
from PIL import Image
from safetensors.torch import save_file
from sklearn.neighbors import NearestNeighbors

import lejepa_scale
from lejepa_scale.cli.main import main
from lejepa_scale.config import validate
from lejepa_scale.conversion import Given
from lejepa_scale.data import Pixels, evaluation_batches
from lejepa_scale.data.images.photometric import normalize
from lejepa_scale.data.index.classes import class_numbers
from lejepa_scale.data.index.keys import SampleKeys
from lejepa_scale.data.index.shards import index_shards
from lejepa_scale.data.io.reader import expand
from lejepa_scale.data.make import sources
from lejepa_scale.data.make.writer import write_shards
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.pca import pca_maps
from lejepa_scale.evaluation.picture import Settings, draw
from lejepa_scale.evaluation.pictures import image_maps
from lejepa_scale.evaluation.pictures.chart import Line, chart, log_ticks, thinned, ticks
from lejepa_scale.evaluation.pictures.curves import curves, metrics_of
from lejepa_scale.evaluation.pictures.gather import panels
from lejepa_scale.evaluation.pictures.images import Images, fitted, overlaid, shown
from lejepa_scale.evaluation.pictures.neighbours import neighbours, spectrum
from lejepa_scale.evaluation.pictures.page import bytes_of, page
from lejepa_scale.evaluation.pictures.panels import Panels
from lejepa_scale.evaluation.subjects import Subject, of_encoder
from lejepa_scale.model import Encoder

CPU = torch.device("cpu")
FEW = Settings(images=3, sample=20, finer=1)


@pytest.fixture(scope="module")
def run_dir(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of a small encoder with a class token."""
    run = tmp_path_factory.mktemp("picture") / "run"
    tree = small_config(run, scenes, train={"steps": 2, "global_batch": 16}, model={"options": {"depth": 1}})
    lejepa_scale.train(validate(tree))
    return run


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class _Page(HTMLParser):
    """What a page holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.titles, self.images, self.captions = list[str](), list[dict[str, str]](), list[str]()
        self.addresses, self.kinds, self._open = list[str](), list[str](), list[str]()
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.addresses += [given[key] for key in ("src", "href") if key in given]
        if tag == "img" and "src" in given:
            self.images.append(given)
        if tag == "figure":
            self.kinds.append(given["class"])
        if tag not in ("meta", "img", "input", "line", "polyline", "circle"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "polyline", "circle"):
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["h2"]:
            self.titles.append(data)
        if self._open[-1:] == ["figcaption"]:
            self.captions.append(data)


ALL = ["What patches see", "What the class token attends to", "Nearest neighbours", "Spectrum", "Curves of the run"]


def test_the_page_of_a_run_holds_every_panel(
    run_dir: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new/p.html"
    words = ["picture", str(run_dir), "--shards", str(scenes), "--out", str(out), "--images", "3", "--sample", "20"]
    assert main([*words, "--finer", "2", "--threshold", "0.5"]) == 0
    assert capsys.readouterr().out.endswith(f"page: {out}\n")
    text = out.read_text()
    found = _Page(text)
    assert found.titles[:5] == ALL
    assert all(address.startswith("data:image/") for address in found.addresses)
    assert not re.search(r"@import|url\(|https?:", text)  # nothing is fetched
    tiles = 3 * (1 + 3 + 1) + 3 * (1 + 4) + 3 * (1 + 5)  # maps and their image; heads and their mean; neighbours
    assert len(found.images) == tiles
    for name in ("all images", "this image", "foreground"):
        assert found.captions.count(name) == 3
    assert text.count("<polyline") >= 2 + 3  # two spectra; losses
    assert "run" in re.findall(r"<h1>(.*?)</h1>", text)[0]
    assert "images of 64 x 64 px, maps of 16 x 16 places, 2 times finer" in text
    assert {"right", "wrong", "query"} >= {kind for kind in found.kinds if kind not in ("map", "photo")}


@pytest.mark.parametrize(("ending", "begins"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_a_figure_is_drawn(run_dir: Path, scenes: Path, tmp_path: Path, ending: str, begins: bytes) -> None:
    out = tmp_path / f"new/p.{ending}"
    draw(str(run_dir), str(scenes), out, settings=FEW)
    assert out.read_bytes().startswith(begins)
    if ending == "png":
        with Image.open(out) as image:
            assert len(set(image.convert("RGB").resize((90, 60)).getdata())) > 100


def test_a_checkpoint_is_a_run_too(run_dir: Path, scenes: Path, tmp_path: Path) -> None:
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    found = draw(str(checkpoint), str(scenes), tmp_path / "p.html", settings=FEW, weights="first")
    assert found.title == "run"
    assert [len(curve.steps) for curve in found.curves[:3]] == [2, 2, 2]


# -- other encoders and other images


def images_of(folder: Path, pixels: Pixels | None = None) -> Images:
    shards = index_shards(expand([str(folder)]), keys=SampleKeys.parsed("", "cls"))
    return Images(shards, class_numbers([shards]), pixels or Pixels())


def subject_of(build: Callable[[], Any], side: int, pixels: Pixels | None = None) -> Subject:
    return Subject("other", "", build, "", side, pixels or Pixels())


def test_a_resnet_has_no_attention_and_no_curves(scenes: Path, tmp_path: Path) -> None:
    encoder = Encoder("resnet10t", image_size=32)
    save_file(
        {key: value.contiguous() for key, value in encoder.backbone.state_dict().items()}, tmp_path / "w.safetensors"
    )
    out = tmp_path / "p.html"
    settings = Settings(images=2, sample=10, mask=False)
    draw(
        str(tmp_path / "w.safetensors"),
        str(scenes),
        out,
        settings=settings,
        given=Given("resnet10t", 32),
        image_size=32,
    )
    found = _Page(out.read_text())
    assert found.titles == [ALL[0], ALL[2], ALL[3], "Not shown"]
    assert "Attention maps: it has no class token." in out.read_text()
    assert "Curves: this is no run with a metrics.jsonl" in out.read_text()
    assert len(found.images) == 2 * 3 + 2 * 6
    draw(
        str(tmp_path / "w.safetensors"), str(scenes), tmp_path / "p.png", settings=settings,
        given=Given("resnet10t", 32), image_size=32,
    )  # fmt: skip


def test_photographs_in_a_folder_keep_their_shape(run_dir: Path, tmp_path: Path) -> None:
    """Labels are the folders that they lie in; one file is damaged, and left out."""
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate([(90, 150), (160, 80), (400, 60), (70, 70)]):
        folder = tmp_path / "photos" / ("cat" if number % 2 else "<dog>")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{number}.png")
    (tmp_path / "photos/cat/broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing")
    out = tmp_path / "p.html"
    found = draw(str(run_dir), str(tmp_path / "photos"), out, settings=Settings(images=9, size=40, finer=1))
    shapes = {image.key.rpartition("/")[2]: image.image.shape[:2] for image in found.images}
    assert sorted(shapes.values()) == [(40, 40), (40, 64), (80, 40), (96, 40)]  # multiples of 8; about 2.5 : 1 at most
    grids = sorted(image.shared.shape[:2] for image in found.images if image.shared is not None)
    assert grids == [(5, 5), (5, 8), (10, 5), (12, 5)]
    assert [image.heads.shape[1:] == image.own.shape[:2] for image in found.images] == [True] * 4  # type: ignore[union-attr]
    assert {image.label for image in found.images} == {"cat", "<dog>"}
    text = out.read_text()
    assert "&lt;dog&gt;" in text
    assert "<dog>" not in text
    assert any("aspect-ratio: 40 / 96" in image["style"] for image in _Page(text).images)


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_more_channels(channels: int, tmp_path: Path) -> None:
    pixels = Pixels(channels, None, (0.5,) * channels, (0.25,) * channels)
    source = sources.scenes(12, 32, 0, "png", 90, channels=channels)
    write_shards(source.samples, tmp_path / "s", per_shard=12, total=12, classes=source.classes, description={})
    encoder = Encoder("vit_nano", image_size=32, channels=channels, options={"depth": 1})
    found = panels(
        of_encoder(encoder, "grey", 32, pixels), "nowhere", images_of(tmp_path / "s", pixels), FEW, torch.device("cpu")
    )
    one = found.images[0].image
    assert one.shape == (64, 64, 3)
    assert (one[..., :1] == one).all() == (channels == 1)
    assert all(image.heads is not None for image in found.images)
    assert _Page(page(found, "")).titles[:4] == ALL[:4]


def test_an_encoder_of_squares_alone_is_given_squares(tmp_path: Path) -> None:
    """A Swin at its own size, of images that are not square."""
    rng = np.random.default_rng(0)
    for number in range(3):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (60, 100, 3), np.uint8)).save(tmp_path / f"photos/{number}.png")
    main(["shards", "make", "folder", str(tmp_path / "photos"), "--out", str(tmp_path / "s")])
    small = {"img_size": 56, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "num_classes": 0}

    def build() -> Any:
        return timm.create_model("swin_tiny_patch4_window7_224", **small).eval()

    found = panels(subject_of(build, 56), "nowhere", images_of(tmp_path / "s"), FEW, CPU)
    assert [image.image.shape for image in found.images] == [(56, 56, 3)] * 3
    assert any("takes squares alone" in reason for reason in found.left_out)


def test_one_image_is_enough(run_dir: Path, tmp_path: Path) -> None:
    source = sources.scenes(1, 32, 0, "png", 90)
    write_shards(source.samples, tmp_path / "s", per_shard=1, total=1, classes=source.classes, description={})
    found = draw(str(run_dir), str(tmp_path / "s"), tmp_path / "p.html", settings=FEW)
    assert len(found.images) == 1
    assert found.spectrum is None
    assert any("two images at least" in reason for reason in found.left_out)
    draw(str(run_dir), str(tmp_path / "s"), tmp_path / "p.png", settings=FEW)


def test_features_are_those_of_the_shown_images(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own map of the image that is shown, standardized by hand; its attention with it."""
    encoder = Encoder("vit_nano", image_size=32, options={"depth": 1})
    seen = list[torch.Tensor]()
    coloured = image_maps.pca.shared_colours
    monkeypatch.setattr(image_maps.pca, "shared_colours", lambda maps: seen.extend(maps) or coloured(maps))
    found = panels(of_encoder(encoder, "e", 32, Pixels()), "nowhere", images_of(scenes), FEW, CPU)
    mean, std = (torch.tensor(v)[:, None, None] for v in (Pixels().mean, Pixels().std))
    for image, features in zip(found.images, seen, strict=False):
        x = (torch.from_numpy(image.image).permute(2, 0, 1) / 255 - mean) / std
        with torch.no_grad():
            expected = encoder.eval().patch_features(x[None])[0]
        assert torch.nn.functional.cosine_similarity(features, expected, dim=-1).min() > 0.99  # shown in 8 bits
    together = pca_maps(torch.stack(seen[:3]))
    for number, image in enumerate(found.images):
        np.testing.assert_allclose(image.shared, together[number].numpy(), atol=1e-6)
        np.testing.assert_allclose(image.own, pca_maps(seen[number][None])[0].numpy(), atol=1e-6)


def test_neighbours_stand_beside_their_query(scenes: Path) -> None:
    """Of all images, by features of the encoder itself."""
    encoder, images = Encoder("vit_nano", image_size=32, options={"depth": 1}).eval(), images_of(scenes)
    settings = Settings(images=12, sample=96, finer=1, batch=10)
    found = panels(of_encoder(encoder, "e", 32, Pixels()), "nowhere", images, settings, CPU)
    ((stored, labels),) = evaluation_batches(str(scenes), image_size=32, batch_size=96)
    with torch.no_grad():
        rows = torch.nn.functional.normalize(encoder([normalize(stored)])[0].double(), dim=1)
    keys = [images.key(position) for position in range(96)]
    assert len(set(keys)) == 96
    for image, (query, *others) in zip(found.images, found.rows, strict=True):
        number = keys.index(image.key)
        assert image.label == query.label == str(int(labels[number]))
        cosines, nearest = (rows[number] @ rows.T).sort(descending=True)
        assert [one.cosine for one in others] == pytest.approx(cosines[1:6].tolist(), abs=1e-5)
        assert [one.label for one in others] == [str(int(labels[other])) for other in nearest[1:6]]
        assert [one.right for one in others] == (labels[nearest[1:6]] == labels[number]).tolist()
        small = query.image.reshape(32, 4, 32, 4, 3).mean((1, 3))  # 128 px
        assert np.abs(small - stored[number].permute(1, 2, 0).numpy()).mean() < 6
    expected = (rows.sum(0).square().sum() - 96) / (96 * 95)
    assert found.facts["mean cosine"] == f"{float(expected):.2f}"
    text = page(found, "")
    kinds = [kind for kind in _Page(text).kinds if kind in ("query", "right", "wrong")]
    flags = [
        "query" if i == 0 else "right" if one.right else "wrong" for row in found.rows for i, one in enumerate(row)
    ]
    assert kinds == flags
    assert {"right", "wrong"} <= set(kinds)


# -- the draw, sizes and colours


def test_the_draw_is_the_same_every_time(scenes: Path) -> None:
    images = images_of(scenes)
    assert len(images) == 96
    assert images.drawn(10, 0) == images.drawn(10, 0) != images.drawn(10, 1)
    assert sorted(images.drawn(500, 3)) == list(range(96))
    assert [images.label(position) for position in (0, 31, 32, 95)] == [0, 1, 2, 5]  # over the ends of shards
    assert images.name(-1) == ""


@pytest.mark.parametrize(
    ("shape", "size", "stride", "square", "expected"),
    [
        ((100, 150), 64, (16, 16), False, (64, 96)),
        ((150, 100), 60, (14, 14), False, (84, 56)),
        ((1000, 100), 32, (8, 8), False, (80, 32)),
        ((100, 150), 64, (16, 16), True, (64, 64)),
        ((30, 30), 4, (16, 16), False, (16, 16)),
        ((60, 60), 30, (1, 1), True, (30, 30)),
    ],
)
def test_sides_are_whole_patches(
    shape: tuple[int, int], size: int, stride: tuple[int, int], square: bool, expected: tuple[int, int]
) -> None:
    image = np.zeros((*shape, 3), np.uint8)
    image[shape[0] // 2 - 2 : shape[0] // 2 + 2, shape[1] // 2 - 2 : shape[1] // 2 + 2] = 255
    found = fitted(image, size, stride, square=square)
    assert tuple(found.shape) == (3, *expected)
    bright = (found[0] > 60).nonzero().float().mean(0)
    if size > 4:
        assert (bright - (torch.tensor(expected) - 1) / 2).abs().max() <= 1.5  # the middle stays in the middle


def test_what_is_shown() -> None:
    assert shown(torch.arange(5.0)[:, None, None].expand(5, 2, 2))[0, 0].tolist() == [0, 1, 2]
    assert shown(torch.tensor([7.0, 9.0])[:, None, None])[0, 0].tolist() == [7, 7, 7]
    colours = np.array([[[0, 0.5, 1], [np.nan] * 3]], np.float32)
    assert bytes_of(colours).tolist() == [[[0, 128, 255, 255], [0, 0, 0, 0]]]
    assert bytes_of(colours[:, :1]).tolist() == [[[0, 128, 255]]]
    attended = np.zeros((4, 4), np.float32)
    attended[1, 2] = 0.3
    bright = overlaid(np.full((64, 64, 3), 200, np.uint8), attended).astype(int).sum(-1)
    assert tuple(np.argwhere(bright == bright.max()).mean(0) // 16) == (1, 2)
    even = overlaid(np.full((8, 8, 3), 200, np.uint8), np.full((4, 4), 0.25, np.float32))
    assert len(set(even.reshape(-1).tolist())) <= 3


# -- neighbours, spectrum, curves


def test_neighbours_are_scikit_learns() -> None:
    rows, labels = torch.randn(60, 7) + 0.5, torch.randint(0, 4, (60,))
    labels[5:9] = -1
    found = neighbours(rows, labels, 5)
    near = NearestNeighbors(n_neighbors=6, metric="cosine", algorithm="brute").fit(rows.double().numpy())
    distances, indices = near.kneighbors(rows.double().numpy())
    assert found.rows.tolist() == indices[:, 1:].tolist()
    np.testing.assert_allclose(found.cosines.numpy(), 1 - distances[:, 1:], atol=1e-6)
    unit = rows.double().numpy() / np.linalg.norm(rows.double().numpy(), axis=1, keepdims=True)
    products = unit @ unit.T
    assert found.mean_cosine == pytest.approx(products[~np.eye(60, dtype=bool)].mean(), abs=1e-9)
    known = np.flatnonzero(labels.numpy() >= 0)
    np.fill_diagonal(products, -2)
    best = known[products[np.ix_(known, known)].argmax(1)]
    assert found.agreement == pytest.approx((labels.numpy()[best] == labels.numpy()[known]).mean())
    alike = labels.numpy()[known][:, None] == labels.numpy()[known]
    assert found.chance == pytest.approx(alike[~np.eye(len(known), dtype=bool)].mean())
    none = neighbours(rows[:3], torch.full((3,), -1), 5)
    assert none.rows.shape == (3, 2)
    assert (none.agreement, none.chance) == (None, None)


@pytest.mark.parametrize(("count", "width"), [(200, 12), (10, 30)])
def test_the_spectrum_is_that_of_singular_values(count: int, width: int) -> None:
    rows = np.random.default_rng(0).normal(size=(count, width)) * np.geomspace(1, 0.01, width) + 2
    found = spectrum(torch.from_numpy(rows).float())
    values = np.linalg.svd(rows - rows.mean(0), compute_uv=False)[: min(count - 1, width)]
    np.testing.assert_allclose(found.shares, values**2 / (values**2).sum(), rtol=1e-3, atol=1e-9)
    p = values / values.sum()
    assert found.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-3)
    assert sum(found.of_gaussian) == pytest.approx(1)
    assert len(found.of_gaussian) == len(values)
    assert found.rank_of_gaussian > 0.85 * len(values)
    assert (found.samples, found.width) == (count, width)


LINES = """{"step": 1, "loss": 2.0, "loss_prediction": 1.0, "loss_sigreg": 5, "grad_norm": null}
not json
{"step": 2, "loss": null, "loss_prediction": 0.5}
[1, 2]
{"loss": 3}
{"step": 3, "loss": "high", "loss_sigreg": Infinity, "probe_accuracy": 0.5, "loss_prediction": true}
"a word"
{"step": 2, "loss_prediction": 0.25}
{"step": 4, "loss": 1.0"""


def test_curves_pass_over_what_is_no_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\0\0\0\n" + LINES.encode() + b"\n\xff\xfe\n")
    found = {curve.title: (curve.steps, curve.values) for curve in curves(path)}
    assert found == {
        "loss": ([1], [2.0]),
        "prediction loss": ([1, 2], [1.0, 0.25]),
        "SIGReg loss": ([1], [5.0]),
        "accuracy of the online probe": ([3], [0.5]),
    }
    path.write_text("")
    assert curves(path) == []


def test_losses_below_zero_have_no_logarithm(scenes: Path, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    values = {"loss": -1.0, "loss_sigreg": 2.0, "probe_accuracy": 0.5}
    path.write_text("".join(json.dumps({"step": step, **values}) + "\n" for step in (1, 2)))
    found = {curve.title: curve.logarithmic for curve in curves(path)}
    assert found == {"loss": False, "SIGReg loss": True, "accuracy of the online probe": False}


def test_metrics_are_found_from_a_run_and_its_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/step_1").mkdir(parents=True)
    assert metrics_of(tmp_path) is None
    (tmp_path / "metrics.jsonl").touch()
    for folder in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints/step_1"):
        assert metrics_of(str(folder)) == tmp_path / "metrics.jsonl"
    assert metrics_of(tmp_path / "other") is None
    assert metrics_of("s3://bucket/run") is None
    assert metrics_of("timm:resnet18") is None


@pytest.mark.parametrize("records", [0, 1])
def test_a_run_that_has_hardly_begun_has_a_page(run_dir: Path, scenes: Path, tmp_path: Path, records: int) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(run_dir / "checkpoints")
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": 1, "loss": 2.5}) + "\n" for _ in range(records)))
    for ending in ("html", "png"):
        found = draw(str(run), str(scenes), tmp_path / f"p.{ending}", settings=FEW)
    assert len(found.curves) == records
    text = (tmp_path / "p.html").read_text()
    assert ("1 record, up to step 1" in text, "holds no record" in text) == (records == 1, records == 0)
    assert text.count("<circle") == records


def test_ticks_are_round_and_reach_around() -> None:
    assert ticks(0.0, 1.0) == [0, 0.25, 0.5, 0.75, 1]
    assert ticks(13, 87) == [0, 20, 40, 60, 80, 100]
    assert ticks(1, 9, whole=True)[:3] == [0, 2, 4]
    assert log_ticks(0.003, 250) == [1e-3, 1e-2, 1e-1, 1, 10, 100, 1000]
    assert log_ticks(0.3, 0.9) == pytest.approx([0.2, 0.5, 1])
    for low, high in ((0.5, 0.5), (1e-9, 3.0), (2.0, 2.1), (1.0, 10.0)):
        for found in (ticks(low, high), log_ticks(low, high)):
            assert found[0] <= low <= high <= found[-1]
            assert 2 <= len(found) <= 9


def test_a_chart_is_where_its_values_are() -> None:
    drawn = chart([Line("loss <a>", [0, 50, 100], [1.0, 10.0, 100.0])], x_label="step", logarithmic=True)
    points = [tuple(map(float, p.split(","))) for p in re.findall(r'points="([^"]+)"', drawn)[0].split()]
    assert points[1] == pytest.approx(((points[0][0] + points[2][0]) / 2, (points[0][1] + points[2][1]) / 2), abs=0.11)
    assert points[0][1] > points[2][1]  # upwards
    assert "loss &lt;a&gt;" in drawn
    with pytest.raises(ValueError, match="finite"):
        chart([Line("x", [1], [float("nan")])], x_label="")
    with pytest.raises(ValueError, match="above 0"):
        chart([Line("x", [1, 2], [0.0, 1.0])], x_label="", logarithmic=True)
    many = [(float(i), 100.0 if i == 4321 else 0.0) for i in range(10_000)]
    assert len(thinned(many)) <= 800
    assert (4321.0, 100.0) in thinned(many)


# -- what is refused


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        (["--out", "p.gif"], "a page (.html) or a figure (.png, .pdf, .svg)"),
        (["--out", "p.html", "--threshold", "1.5"], "between 0 and 1, not at 1.5"),
        (["--out", "p.html", "--device", "cdua"], "device cdua is not here"),
        (["--out", "p.html", "--size", "0"], "at least 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    words: list[str], needle: str, run_dir: Path, scenes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: Any = main(["picture", str(run_dir), "--shards", str(scenes), *words])
    except SystemExit as left:
        status = left.code
    assert status == 2
    assert needle in capsys.readouterr().err


def test_what_is_no_run_and_no_image_is_refused(run_dir: Path, scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nor a run directory"):
        draw(str(tmp_path), str(scenes), tmp_path / "p.html")
    with pytest.raises(UserError, match="nothing"):
        draw(str(run_dir), str(tmp_path / "nothing"), tmp_path / "p.html")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing")
    with pytest.raises(UserError, match="none of the 1 images that were tried can be used"):
        draw(str(run_dir), str(tmp_path / "photos"), tmp_path / "p.html")
    assert not (tmp_path / "p.html").exists()


def test_features_that_are_not_finite_are_refused(scenes: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=0, dynamic_img_size=True)
    model.norm.weight.data[0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        panels(subject_of(lambda: model, 32), "nowhere", images_of(scenes), FEW, CPU)


def test_a_figure_without_matplotlib_names_the_extra_and_a_page_needs_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run_dir: Path, scenes: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'lejepa_scale\[report\]'"):
        draw(str(tmp_path), "x", tmp_path / "p.png")
    assert isinstance(draw(str(run_dir), str(scenes), tmp_path / "p.html", settings=FEW), Panels)
