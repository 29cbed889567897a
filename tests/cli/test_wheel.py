"""What is installed: the contents of sdist and wheel, and the wheel at work where only its base requirements are."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

SOURCES = ("lejepa_scale", "configs", "tests", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
EXTRAS = {
    "deepspeed",
    "transformers",
    "onnx",
    "moto",
    "xformers",
    "torchao",
    "wandb",
    "tensorboard",
    "matplotlib",
    "scipy",
    "pytest",
    "beartype",
}


def run(*words: object, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        [*map(str, words)],
        cwd=folder,
        env=clean | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An sdist, and a wheel built from it, out of a copy of the checkout: building leaves folders beside its sources."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    result = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, folder=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


def test_the_wheel_holds_the_package_and_nothing_else(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["wheel"]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        information = [name for name in archive.namelist() if ".dist-info/" in name]
        (metadata,) = (archive.read(name).decode() for name in information if name.endswith("/METADATA"))
        (scripts,) = (archive.read(name).decode() for name in information if name.endswith("/entry_points.txt"))
    package = ROOT / "lejepa_scale"
    wanted = {f"lejepa_scale/{p.relative_to(package)}" for kind in ("*.py", "*.cpp") for p in package.rglob(kind)}
    wanted |= {f"lejepa_scale/recipes/{p.name}" for p in (ROOT / "configs").glob("*.yaml")}
    assert names == wanted | {"lejepa_scale/py.typed"}
    assert "lejepa = lejepa_scale.cli.main:main" in scripts
    assert "License-Expression: Apache-2.0" in metadata
    assert any(name.endswith("/licenses/LICENSE") for name in information)
    extras = set(re.findall(r"^Provides-Extra: (.*)$", metadata, re.MULTILINE))
    assert extras == {"zero", "gpu", "wandb", "tensorboard", "report", "hf", "onnx", "all", "dev"}
    base = [line for line in re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE) if "extra ==" not in line]
    assert not {Requirement(line).name for line in base} & EXTRAS


def test_the_sdist_can_be_built_and_holds_no_tests(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "setup.py",
        "configs/quickstart.yaml",
        "lejepa_scale/py.typed",
        "lejepa_scale/model/norm.cpp",
        "lejepa_scale/objective/cpu_kernels.cpp",
        "lejepa_scale/cli/main.py",
    }
    assert not [name for name in names if name.startswith("tests")]


def needed(requirements: list[str]) -> set[str]:
    """Names of the distributions that these requirements bring, as they are installed here."""
    found: set[str] = set()
    asked = [Requirement(text) for text in requirements]
    while asked:
        one = asked.pop()
        extras = {"", *one.extras}
        if one.marker is not None and not any(one.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        try:
            here = distribution(one.name)
        except PackageNotFoundError:  # of another platform
            continue
        if one.name not in found:
            found.add(one.name)
            inner = [Requirement(text) for text in here.requires or []]
            asked += [r for r in inner if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in extras)]
    return found


@pytest.fixture(scope="module")
def environment(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel, and links to what its base requirements bring of this one: no network, no copy
    of torch, and nothing else that could be imported."""
    folder = tmp_path_factory.mktemp("fresh")
    assert run(sys.executable, "-m", "venv", "--without-pip", folder, folder=folder).returncode == 0
    (site,) = folder.glob("lib/python*/site-packages")
    install = run(
        sys.executable, "-m", "pip", "--python", folder / "bin/python", "install", "--no-deps", "--no-index",
        built["wheel"], folder=folder,
    )  # fmt: skip
    assert install.returncode == 0, install.stderr
    (metadata,) = site.glob("lejepa_scale-*.dist-info/METADATA")
    base = re.findall(r"^Requires-Dist: (.*)$", metadata.read_text(), re.MULTILINE)
    for name in needed([text for text in base if "extra ==" not in text]):
        here = distribution(name)
        for top in {file.parts[0] for file in here.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(here.locate_file(top))))
    return folder


def test_only_the_base_requirements_can_be_imported_there(environment: Path, tmp_path: Path) -> None:
    program = "import importlib.util, sys; print(*[n for n in sys.argv[1:] if importlib.util.find_spec(n)])"
    result = run(environment / "bin/python", "-c", program, *sorted(EXTRAS), "torch", "lejepa_scale", folder=tmp_path)
    assert result.stdout.split() == ["torch", "lejepa_scale"], result.stderr
    found = run(environment / "bin/python", "-c", "import lejepa_scale; print(lejepa_scale.__file__)", folder=tmp_path)
    assert found.stdout.startswith(str(environment)), found.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_alone_makes_shards_and_trains(environment: Path, tmp_path: Path) -> None:
    """Away from the checkout: shards, three steps of a recipe named without a path, features from Python, and what is
    absent is asked for by the name of its extra."""
    lejepa = environment / "bin/lejepa"
    versions = run(lejepa, "--version", folder=tmp_path).stdout
    assert re.search(r"^deepspeed +absent$", versions, re.MULTILINE)
    made = run(lejepa, "shards", "make", "synthetic", "--out", "scenes", "--count", 40, "--size", 48, folder=tmp_path)
    assert made.returncode == 0, made.stderr
    trained = run(
        lejepa, "train", "--config", "quickstart", "engine.name=single", "train.steps=3", "train.global_batch=8",
        "optim.warmup_steps=1", "data.shards=scenes", "run.dir=run", "log.every=1", folder=tmp_path,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").open()] == [1, 2, 3]

    program = (
        "import sys, torch, lejepa_scale\n"
        "from lejepa_scale.cli.main import main\n"
        "encoder, config = lejepa_scale.load_encoder('run')\n"
        "loss = lejepa_scale.SIGReg(num_slices=8)(torch.randn(16, 4), step=0)\n"
        "mixture = lejepa_scale.open_mixture(config.data)\n"
        "print(encoder([torch.randn(2, 3, 48, 48)])[0].shape, loss.ndim, mixture.num_samples)\n"
        "keys = ['engine.name=zero1', 'optim.name=adamw', *sys.argv[1:]]\n"
        "try: lejepa_scale.train(lejepa_scale.load_config('quickstart', keys))\n"
        "except lejepa_scale.UserError as error: print(error)\n"
        "sys.exit(main(['picture', 'run', '--shards', 'scenes', '--out', 'p.png']))\n"
    )
    used = run(environment / "bin/python", "-c", program, "data.shards=scenes", "run.dir=other", folder=tmp_path)
    assert used.stdout.startswith("torch.Size([2, 256]) 0 40\n"), used.stderr
    assert "pip install 'lejepa_scale[zero]'" in used.stdout
    assert used.returncode == 2
    assert used.stderr.endswith(
        "error: a picture needs matplotlib: pip install 'lejepa_scale[report]'; a page does not: --out NAME.html.\n"
    )
