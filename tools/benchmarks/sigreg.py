"""SIGReg against its textbook form and against the two matrix products that it cannot do without: time, memory, growth,
building, and the bytes that cross ranks. Each section is a function from sizes to rows."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import Results, Row, Work, interleaved, milliseconds, peak_bytes, run_sections
from benchmarks.ports import free_port
from lejepa_scale.objective import Regularizer, SIGReg, VISReg, cpu_kernels
from lejepa_scale.objective.characteristic import has_triton
from lejepa_scale.objective.comm_cost import MODES
from lejepa_scale.parallel import collectives, launch, process_group


@dataclass(frozen=True)
class Shape:
    samples: int
    width: int
    slices: int
    knots: int = 17

    def __str__(self) -> str:
        return f"N={self.samples} D={self.width} M={self.slices} K={self.knots}"


@dataclass(frozen=True)
class Sizes:
    """One scale of the whole benchmark; the first shape is the one with a promise."""

    shapes: tuple[Shape, ...]
    samples: tuple[int, ...]  # at the first shape's D, M and K
    widths: tuple[int, ...]
    sorted: tuple[Shape, ...]  # of VISReg, which has no knots; of each view
    views: int
    ranks: tuple[int, ...]  # gloo processes
    simulated: tuple[int, ...]
    rank_samples: tuple[int, ...]
    repeats: int


CPU = Sizes(
    shapes=(
        Shape(2048, 256, 1024), Shape(512, 512, 1024), Shape(2048, 64, 1024), Shape(2048, 256, 256),
        Shape(2048, 256, 4096), Shape(2048, 256, 1024, 9), Shape(2048, 256, 1024, 33),
    ),
    samples=(512, 1024, 2048, 4096, 8192), widths=(64, 128, 256, 512, 1024),
    sorted=(Shape(512, 256, 1024), Shape(512, 256, 4096)), views=8,
    ranks=(2, 4), simulated=(8, 64, 512), rank_samples=(128, 8192), repeats=9,
)  # fmt: skip
CUDA = Sizes(
    shapes=(
        Shape(8192, 256, 1024), Shape(512, 256, 1024), Shape(32768, 256, 1024), Shape(8192, 64, 1024),
        Shape(8192, 256, 8192), Shape(32768, 64, 8192),
    ),
    samples=(512, 2048, 8192, 32768), widths=(64, 256, 1024),
    sorted=(Shape(512, 256, 4096), Shape(8192, 256, 4096)), views=8,
    ranks=(), simulated=(), rank_samples=(), repeats=20,
)  # fmt: skip
TOY = Sizes(
    shapes=(Shape(128, 16, 32),), samples=(64, 128), widths=(8, 16),
    sorted=(Shape(32, 8, 16),), views=2,
    ranks=(2,), simulated=(8,), rank_samples=(16, 32), repeats=1,
)  # fmt: skip


def measure(sizes: Sizes, device: torch.device) -> Results:
    sections = {
        "arithmetic": (compare(shape, device, sizes.repeats) for shape in sizes.shapes),
        "VISReg": (sort(shape, sizes.views, device, sizes.repeats) for shape in sizes.sorted),
        "growth": growth(sizes, device),
        "building": building(sizes.shapes[0], device),
        "ranks": ranks(sizes),
        "simulated ranks": simulated_ranks(sizes),
    }
    return run_sections(sections, device, minutes=60)


def backends(device: torch.device) -> list[str]:
    """The ways of computing that run here, the one that `auto` prefers first."""
    if device.type == "cuda":
        return ["triton", "fused"] if has_triton() else ["fused"]
    return ["native", "fused"] if cpu_kernels.available() else ["fused"]


def compare(shape: Shape, device: torch.device, repeats: int) -> Row:
    """Forward and backward of each backend, the textbook form and the GEMMs, in turns; memory of each; agreement."""
    z, row, works = _embeddings(shape, device), Row(case=str(shape)), dict[str, Work]()
    truth: tuple[Tensor, Tensor] | None = None
    for backend in ("reference", *backends(device)):
        work = partial(_evaluate, SIGReg(shape.slices, shape.knots, backend=backend), z)  # type: ignore[arg-type]
        try:
            value, gradient = work()
        except torch.OutOfMemoryError:
            row[f"{backend} ms"] = "not measured: out of memory"
            continue
        if backend == "reference":
            truth = value, gradient
        elif truth is not None:
            close = bool(abs(value / truth[0] - 1) < 1e-4 and (gradient - truth[1]).norm() < 1e-3 * truth[1].norm())
            row["ok"] = row.get("ok", True) and close
        works[backend] = work
    a = SIGReg(shape.slices).directions(0, shape.width, device, z.dtype)
    works["GEMMs"] = lambda: (z @ a.T) @ a
    found = interleaved(works, device, repeats)
    row |= {f"{name} ms": spent for name, spent in found.items()}
    best = next(name for name in backends(device) if name in found)
    if "reference" in found:
        row["times faster"] = found["reference"] / found[best]
    row["times the GEMMs"] = found[best] / found["GEMMs"]
    if best != "fused" and "fused" in found:
        row["fused times the GEMMs"] = found["fused"] / found["GEMMs"]
    floats = 4 * shape.samples * shape.slices
    for name in works.keys() - {"GEMMs"}:
        row[f"{name} memory / NM floats"] = peak_bytes(works[name], device) / floats
    return row


def sort(shape: Shape, views: int, device: torch.device, repeats: int) -> Row:
    """Forward and backward of VISReg's shape term and of its textbook form, in turns; memory of each; agreement."""
    z = _embeddings(Shape(views * shape.samples, shape.width, shape.slices), device).unflatten(0, (views, -1))
    visreg = VISReg(shape.slices)
    a = visreg.directions(0, shape.width, device, z.dtype)
    works: dict[str, Work] = {"blocks": partial(_evaluate, visreg, z), "textbook": partial(_sorted_textbook, z, a)}
    (value, gradient), truth = _evaluate(visreg, z), _sorted_textbook(z, a)
    found = interleaved(works | {"GEMMs": lambda: (z @ a.T) @ a}, device, repeats)
    row = Row(case=f"V={views} N={shape.samples} D={shape.width} M={shape.slices}")
    row["ok"] = bool(abs(value / truth[0] - 1) < 1e-4 and (gradient - truth[1]).norm() < 1e-2 * truth[1].norm())
    row |= {f"{name} ms": spent for name, spent in found.items()}
    row["times faster"] = found["textbook"] / found["blocks"]
    return row | {f"{name} MB": peak_bytes(work, device) / 1e6 for name, work in works.items()}


def _sorted_textbook(z: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Projections [V, N, M], sorted over samples, with autograd."""
    x = z.detach().requires_grad_()
    centred = x - x.mean(1, keepdim=True)
    sigma = centred.square().mean(1, keepdim=True).sqrt() + 1e-6
    p = ((centred / sigma.detach()) @ a.T).sort(dim=1).values
    i = torch.arange(1, z.shape[1] + 1, device=z.device, dtype=torch.float64)
    value = (p - torch.special.ndtri(i / (z.shape[1] + 1)).to(p)[:, None]).square().mean()
    return value.detach(), torch.autograd.grad(value, x)[0]


def growth(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Log-log slopes of time and memory against N and against D: 1 is linear."""
    first = sizes.shapes[0]
    sweeps = {
        "N": [Shape(n, first.width, first.slices, first.knots) for n in sizes.samples],
        "D": [Shape(first.samples, d, first.slices, first.knots) for d in sizes.widths],
    }
    for name, shapes in sweeps.items():
        for backend in backends(device):
            logs = []
            for shape in shapes:
                sigreg = SIGReg(shape.slices, shape.knots, backend=backend)  # type: ignore[arg-type]
                work = partial(_evaluate, sigreg, _embeddings(shape, device))
                spent = milliseconds(work, device, sizes.repeats)
                size = shape.samples if name == "N" else shape.width
                logs.append([math.log(x) for x in (size, spent, peak_bytes(work, device))])
            x, spent_log, memory_log = torch.tensor(logs, dtype=torch.float64).T
            yield {
                "case": f"{backend} against {name} = {', '.join(str(round(math.exp(row[0]))) for row in logs)}",
                "time slope": _slope(x, spent_log),
                "memory slope": _slope(x, memory_log),
                "ms": ", ".join(f"{math.exp(row[1]):.3g}" for row in logs),
            }


def _slope(x: Tensor, y: Tensor) -> float:
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x @ x))


def building(shape: Shape, device: torch.device) -> Iterator[Row]:
    """First forward and backward of a process, without and with what an earlier process left on disk."""
    if backends(device)[0] == "fused":
        yield {"case": "kernels", "not measured": "neither Triton nor a C++ compiler"}
        return
    script = (
        "import time, torch\n"
        "from lejepa_scale.objective import SIGReg\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        f"z = torch.randn({shape.samples}, {shape.width}, device='{device.type}', requires_grad=True)\n"
        f"sigreg = SIGReg({shape.slices}, {shape.knots}, backend='{backends(device)[0]}')\n"
        "started = time.perf_counter()\n"
        "sigreg(z, step=0).backward()\n"
        "print(time.perf_counter() - started)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "XDG_CACHE_HOME": folder, "TRITON_CACHE_DIR": folder}
        seconds = [
            float(subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True,
                                 check=True, timeout=300).stdout.split()[-1])
            for _ in range(2)
        ]  # fmt: skip
    yield {"case": f"first call at {shape}", "cold seconds": seconds[0], "cached seconds": seconds[1]}


def ranks(sizes: Sizes) -> Iterator[Row]:
    """Real gloo processes: bytes that a rank hands to collectives, counted as they are called, and the time of a call."""
    shape = sizes.shapes[0]
    for world in sizes.ranks:
        port = free_port()
        arguments = (world, port, sizes.rank_samples, shape, sizes.repeats)
        with torch.multiprocessing.get_context("spawn").Pool(world) as pool:
            rows = pool.starmap(_on_rank, [(rank, *arguments) for rank in range(world)], chunksize=1)
        yield from rows[0]


def _on_rank(rank: int, world: int, port: int, samples: tuple[int, ...], shape: Shape, repeats: int) -> list[Row]:
    launch.declare(rank, world, rank)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    device = process_group.join(timedelta(seconds=300))
    rows = [
        _counted(mode, Shape(n // world, shape.width, shape.slices, shape.knots), world, repeats)
        for n in samples
        for mode in MODES
    ]
    collectives.barrier()
    process_group.leave()
    del device
    return rows


def simulated_ranks(sizes: Sizes) -> Iterator[Row]:
    """More ranks than there are machines: the same code over torch's fake process group, which moves nothing. The bytes
    are those that the code hands over; times would mean nothing."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    shape = sizes.shapes[0]
    for world in sizes.simulated:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
        try:
            for n in sizes.rank_samples:
                yield _counted("sums", Shape(max(1, n // world), shape.width, shape.slices, shape.knots), world, 0)
        finally:
            dist.destroy_process_group()


def _counted(mode: str, shape: Shape, world: int, repeats: int) -> Row:
    """shape: of one rank."""
    z = _embeddings(shape, torch.device("cpu"))
    sigreg = SIGReg(shape.slices, shape.knots, backend="fused", communication=mode)  # type: ignore[arg-type]
    counts = [shape.samples] * world
    with collectives.CountBytes() as calls:
        _evaluate(sigreg, z, counts)
    expected = 4 * (2 * shape.slices * (shape.knots - 1) + 1)  # one view, and the count of samples
    handed = sum(size for _, size in calls.calls)
    row: Row = {
        "case": f"{world} ranks, {mode}, N={shape.samples * world} in all",
        "bytes": handed,
        "collectives": ", ".join(name for name, size in calls.calls if size),
    }
    if mode == "sums":
        row["ok"] = handed == expected and len(calls.calls) == 1
    if repeats:
        row["ms"] = milliseconds(partial(_evaluate, sigreg, z, counts), z.device, repeats)
    return row


def _embeddings(shape: Shape, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape.samples, shape.width, generator=generator, device=device)


def _evaluate(regularizer: Regularizer, z: Tensor, counts: list[int] | None = None) -> tuple[Tensor, Tensor]:
    x = z.detach().requires_grad_()
    value = regularizer(x, step=0, counts=counts)
    return value.detach(), torch.autograd.grad(value, x)[0]
