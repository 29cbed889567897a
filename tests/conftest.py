from __future__ import annotations

import errno
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import shape_checks
import torch
from benchmarks.ports import free_port
from processes import Forks, forks
from ranks import PRELOADED, as_rank

if shape_checks.wanted():  # before anything of the package is imported
    shape_checks.install()

from lejepa_scale.config import Config, ViewGroup, Views
from lejepa_scale.parallel import process_group

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers have a core each; threads that spin for one another double a test's time

ROOT = Path(__file__).parents[1]

# What starts the tests in the background or under nohup ignores these, and so would all that the tests start and signal.
for _number, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _usual)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if shape_checks.wanted():
        for item in items:
            if item.get_closest_marker("unchecked"):
                item.add_marker(pytest.mark.skip(reason="wrong types on purpose, stand-ins, or a bound on time"))


def pytest_collection_finish() -> None:
    gc.freeze()  # what is there for the whole session needs no looking through (see PRELOADED)


_ON_A_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
DEVICES = ["cpu", pytest.param("cuda", marks=_ON_A_GPU)]  # parameters of a test


def mostly_slow(cases: Iterable[Any], *fast: Any) -> list[Any]:
    """Of many cases of a test, `make test` takes those in `fast`, `make test-all` every one."""
    found = list(cases)
    assert all(case in found for case in fast), fast
    values = [case if isinstance(case, tuple) else (case,) for case in found]
    marks = [[] if case in fast else [pytest.mark.slow] for case in found]
    return [pytest.param(*each, marks=mark) for each, mark in zip(values, marks, strict=True)]


def on_a_gpu(test: Any) -> Any:
    """A test that only a GPU can pass."""
    for mark in _ON_A_GPU:
        test = mark(test)
    return test


@pytest.fixture(autouse=True)
def _logger_of_a_library() -> None:
    """As a new process has it: a command that was called in this one shows the package's messages from then on."""
    logger = logging.getLogger("lejepa_scale")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def _outside_a_group() -> Iterator[None]:
    """An engine in bf16 makes a group of one where there is none."""
    yield
    if torch.distributed.is_initialized():
        process_group.leave()


@pytest.fixture(autouse=True)
def _unchecked_where_traced(request: pytest.FixtureRequest) -> Iterator[None]:
    traced = request.node.get_closest_marker("traced") is not None
    if traced:
        jaxtyping.config.update("jaxtyping_disable", True)
    yield
    if traced:
        jaxtyping.config.update("jaxtyping_disable", False)


def photographs(name: str) -> Path:
    """A file of the test data, which is not part of the repository: under $LEJEPA_TEST_DATA, or shared/data beside it."""
    return Path(os.environ.get("LEJEPA_TEST_DATA") or ROOT.parent / "shared/data") / name


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 labelled scenes of 32 px in three shards."""
    from lejepa_scale.data.make import sources
    from lejepa_scale.data.make.writer import write_shards

    out = tmp_path_factory.mktemp("scenes")
    source = sources.scenes(96, 32, 0, "png", 90)
    write_shards(source.samples, out, per_shard=32, total=96, classes=source.classes, description={})
    return out


def small_views() -> Views:
    return Views(
        global_=ViewGroup(count=2, size=32, scale=(0.5, 1.0)),
        local=ViewGroup(count=2, size=16, scale=(0.2, 0.5)),
    )


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Lets a file be there that this user may not read: root may read every one, whatever its mode."""
    read = Path.read_bytes

    def forbid(path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.touch()

        def refused(self: Path) -> bytes:
            if self == path:
                raise PermissionError(errno.EACCES, "Permission denied", str(self))
            return read(self)

        monkeypatch.setattr(Path, "read_bytes", refused)

    return forbid


def small_config(run_dir: Path | str, shards: Path | str, **sections: dict[str, Any]) -> dict[str, Any]:
    """A configuration that trains in seconds; `sections` are merged over it, and `objective.sigreg` too."""
    tree: dict[str, Any] = {
        "run": {"dir": str(run_dir)},
        "train": {"steps": 4, "global_batch": 16},
        "engine": {"name": "single", "precision": "fp32"},
        "data": {
            "shards": str(shards),
            "views": small_views().model_dump(mode="json", by_alias=True),
        },
        "model": {"encoder": "vit_nano", "options": {"depth": 2}, "projector": {"hidden": 65, "dim": 17}},
        "objective": {},
        "log": {"every": 1},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    objective = tree["objective"]
    regularizer = objective.get("regularizer", "sigreg")
    if regularizer != "weak_sigreg":
        objective[regularizer] = {"num_slices": 32, **objective.get(regularizer, {})}
    return tree


def without_gradient(config: Config) -> set[str]:
    """Parameters of the configured model that its loss does not depend on: their gradient vanishes in float64.

    Such is the bias before a batch normalization. In fp32 it has a gradient of rounding, which no two ways of adding
    agree on; tests hold it to be small instead.
    """
    from lejepa_scale.model import build

    torch.manual_seed(0)
    module = build(config).double()
    views = config.data.views
    module([torch.randn(g.count, 8, 3, g.size, g.size).double() for g in (views.global_, views.local)], 0)[
        "loss"
    ].backward()
    norms = {name: float(p.grad.norm()) for name, p in module.named_parameters() if p.grad is not None}
    return {name for name, norm in norms.items() if norm < 1e-9 * max(norms.values())}


class Command:
    """Run the project's scripts as a user does, but for the imports: a script, or every rank of it, is a fork of a program
    that has done them. With a launcher named, it starts the ranks for real."""

    def __init__(self, folder: Path, server: Forks) -> None:
        self.folder = folder
        self._server = server

    def config(self, tree: dict[str, Any], name: str = "config.yaml") -> Path:
        import yaml

        path = self.folder / name
        path.write_text(yaml.safe_dump(tree))
        return path

    def __call__(self, *arguments: Any, ranks: int = 0, launcher: str | None = None, timeout: float = 240) -> Any:
        words, environments = [*map(str, arguments)], [script_environment()]
        if launcher is not None:
            words = [*launched(ranks, launcher), *words]
        elif ranks:
            port = str(free_port())
            environments = [environments[0] | as_rank(rank, ranks, port) for rank in range(ranks)]
        return self._server.run(words, ROOT, environments, timeout)


def launched(ranks: int, launcher: str = "torchrun") -> list[str]:
    """What stands before a script on so many ranks, behind the interpreter's name."""
    if launcher == "torchrun":
        return ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={free_port()}"]
    return ["-m", "deepspeed.launcher.runner", f"--num_gpus={ranks}", f"--master_port={free_port()}"]


def script_environment() -> dict[str, str]:
    """For programs of the checkout, whose interpreter is this one."""
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    programs = [str(Path(sys.executable).parent), os.environ["PATH"]]
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PATH": os.pathsep.join(programs),
    }


@pytest.fixture(scope="session")
def _server() -> Iterator[Forks]:
    paths = f"import sys; sys.path.append({str(ROOT / 'tests')!r})"
    imports = f"import gc, processes, {', '.join(PRELOADED)}; gc.freeze()"
    with forks(f"{paths}; {imports}", script_environment()) as running:
        yield running


@pytest.fixture
def command(tmp_path: Path, _server: Forks) -> Command:
    return Command(tmp_path, _server)
