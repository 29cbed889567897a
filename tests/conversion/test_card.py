"""The model card: what hubs read of it, and its snippets, which are run; the upload, to a hub of this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from benchmarks.conversion import FAMILIES, written
from PIL import Image

from lejepa_scale.cli.main import main
from lejepa_scale.conversion import convert, open_model
from lejepa_scale.conversion.card import SNIPPETS
from lejepa_scale.conversion.push import push
from lejepa_scale.errors import UserError


def model_of(folder: Path, family: str = "ViT, class token") -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    return open_model(written(FAMILIES[family], folder))


def snippets(card: Path) -> list[str]:
    return [part.split("```")[0] for part in card.read_text().split("```python\n")[1:]]


def features_of(snippet: str, folder: Path, image: Path) -> torch.Tensor:
    """Run it, in the place of "." and of image.png."""
    scope: dict[str, Any] = {}
    ready = (
        snippet.replace('local-dir:."', f'local-dir:{folder}"')
        .replace('"."', f'"{folder}"')
        .replace("image.png", str(image))
    )
    exec(compile(ready, "card", "exec"), scope)
    return scope["features"]


@pytest.mark.parametrize(
    ("family", "kind", "count"),
    [
        ("DINOv2", "timm", 2),
        ("DINOv2", "hf", 1),
        ("gigantic, no layer scale", "hf", 1),
        ("ViT, layer behind the pooling", "timm", 1),
    ],
)
def test_the_snippets_of_a_folder_give_the_sources_features(tmp_path: Path, family: str, kind: str, count: int) -> None:
    pytest.importorskip("transformers")
    model, size = model_of(tmp_path / "in", family), FAMILIES[family].size
    convert(model, tmp_path / "out", kind)
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)  # nothing to resize
    Image.fromarray(pixels).save(tmp_path / "image.png")
    mean, std = (torch.tensor(values) for values in (model.inputs.mean, model.inputs.std))
    with torch.inference_mode():
        expected = model.build()(((torch.from_numpy(pixels / 255) - mean) / std).permute(2, 0, 1)[None].float())
    found = snippets(tmp_path / "out/README.md")
    assert len(found) == count
    for snippet in found:
        torch.testing.assert_close(
            features_of(snippet, tmp_path / "out", tmp_path / "image.png"), expected, rtol=1e-4, atol=1e-4
        )


def test_the_snippets_of_files_run(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model = model_of(tmp_path / "in")
    values = {"width": 96, "inner": 96, "channels": 3, "size": 64, "image": ""}
    for kind in ("safetensors", "onnx"):
        convert(model, tmp_path / kind, kind)
        scope: dict[str, Any] = {}
        exec(compile(SNIPPETS[kind].format(path=tmp_path / kind, **values), kind, "exec"), scope)
        assert tuple(scope["features"].shape) == (1, 96)
    assert scope["patches"].shape == (1, 16, 96)


def test_what_hubs_read(tmp_path: Path) -> None:
    convert(model_of(tmp_path / "in"), tmp_path / "timm")
    convert(model_of(tmp_path / "in"), tmp_path / "hf", "hf", scores=[{"name": "trained", "knn": 0.5, "linear": 0.625}])
    for kind, library in (("timm", "timm"), ("hf", "transformers")):
        text = (tmp_path / kind / "README.md").read_text()
        front = yaml.safe_load(text.split("---")[1])
        assert front["library_name"] == library
        assert front["pipeline_tag"] == "image-feature-extraction"
        assert {"lejepa", library} <= {*front["tags"]}
        assert "license" not in front
        assert "minus mean [0.4, 0.5, 0.6], divided by standard deviation [0.2, 0.25, 0.3]" in text
    assert "exact at 64 px alone" in text
    assert "| trained | 50.0% | 62.5% |" in text
    huggingface_hub = pytest.importorskip("huggingface_hub")
    assert huggingface_hub.ModelCard.load(tmp_path / "hf/README.md").data.library_name == "transformers"


# -- the upload


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as an upload takes: small files within the commit, weights before it."""

    files: dict[str, bytes]
    objects: dict[str, bytes]  # by their SHA-256
    repositories: list[str]
    token = "hf_test"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {self.token}":
            self._answer(401, {"error": "Invalid credentials in Authorization header"})
        elif self.path == "/api/repos/create":
            self.repositories.append(json.loads(body)["name"])
            self._answer(200, {"url": f"http://{self.headers['Host']}/user/name"})
        elif "/preupload/" in self.path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            place = f"http://{self.headers['Host']}/objects"
            actions = [{**one, "actions": {"upload": {"href": f"{place}/{one['oid']}"}}} for one in wanted]
            self._answer(200, {"transfer": "basic", "objects": actions})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    self.files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
                elif row["key"] == "lfsFile":
                    self.files[row["value"]["path"]] = self.objects[row["value"]["oid"]]
            self._answer(
                200,
                {"commitUrl": f"http://{self.headers['Host']}/user/name/commit/1", "commitOid": "1", "success": True},
            )
        elif self.path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        else:
            self._answer(404, {"error": f"nothing at {self.path}"})

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.objects[hashlib.sha256(body).hexdigest()] = body
        self._answer(200, {})

    def do_GET(self) -> None:
        self._answer(200, {"id": "user/name", "siblings": [], "sha": "0", "private": False, "tags": []})

    def _answer(self, status: int, body: Any) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Hub]]:
    constants = pytest.importorskip("huggingface_hub").constants
    _Hub.files, _Hub.objects, _Hub.repositories = {}, {}, []
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # whose protocol the stand-in does not speak
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", _Hub.token)
    yield _Hub
    server.shutdown()


def test_a_folder_is_uploaded_as_it_is(tmp_path: Path, hub: type[_Hub], capsys: pytest.CaptureFixture[str]) -> None:
    model_of(tmp_path / "in")
    words = ["convert", str(tmp_path / "in/source.safetensors"), str(tmp_path / "out"), "--push", "user/name"]
    assert main(words) == 0
    assert "uploaded to http://127.0.0.1:" in capsys.readouterr().out
    assert hub.repositories == ["name"]
    assert len(hub.objects) == 1
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_an_upload_that_is_refused_leaves_the_folder(
    tmp_path: Path, hub: type[_Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(model_of(tmp_path / "in"), tmp_path / "out")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match=r"--push user/name: .*401.*out is written; log in with `hf auth login`"):
        push(tmp_path / "out", "user/name")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"--push user/name: .*refused.*out is written"):
        push(tmp_path / "out", "user/name")
    with pytest.raises(UserError, match=r"--push a/b/c: "):
        push(tmp_path / "out", "a/b/c")
    assert main(["convert", "nowhere", str(tmp_path / "x"), "--to", "onnx", "--push", "user/name"]) == 2
