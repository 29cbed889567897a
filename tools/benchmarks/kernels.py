"""Where the device's time goes in one step: its longest kernels, and shares of products, attention and the rest, from
torch's profiler. On a CPU the same of operators, by the time outside those that they call."""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Row, milliseconds, profiled
from benchmarks.trace import _length, _spans
from benchmarks.trial import Trial

LONGEST = 10
IDLE = "idle"
_OPTIMIZER, _COPIES, _OTHER = "optimizer", "copies and casts", "other"
# The first that fits a name in small letters. Triton's kernels are ours, by their names, or the compiler's.
_KINDS = {
    "attention": r"flash|fmha|attention|sdpa",
    _OPTIMIZER: r"multi_tensor_apply|adam",
    "matrix products": r"gemm|gemv|nvjet|cutlass|cublas|splitk|xmma|conv(?!ert)|[wd]grad|::(add|b|add?b)?mm_?$|::linear$"
    r"|::matmul$|tem_fused\w*mm",
    _COPIES: r"memcpy|memset|copy|_cast|catarray|chunk_cat|nccl|::to$|::cat$|::clone$|::contiguous$",
    "normalization and elementwise": r"norm|gammabeta|elementwise|reduce|softmax|functor|index|gather|scatter|triton"
    r"|^_\w+_kernel|gelu|silu|dropout|fill|zero|^aten::(add|sub|mul|div|neg|pow|sum|mean|rsqrt|sin|cos|where)_?$",
}
_TELLING = re.compile(r"\w*(?:Functor|_cuda\b|KernelImpl|[gG]emm|[fF]lash|fmha|Ops\b)\w*")
_WRAPPERS = ("kernel", "kernel2", "device_kernel")  # of CUTLASS: the argument tells more


@dataclass(frozen=True)
class Span:
    """A kernel, or an operator's own part, in microseconds."""

    name: str
    begin: float
    own: float
    kind: str


def profile(trial: Trial, repeats: int) -> list[Row]:
    """Rows of one step: the step, its shares by kind, and its longest kernels. Shares are of a step without the profiler on
    CUDA, where it slows the host alone, and with it on a CPU."""

    def step() -> None:
        trial.step(trial.synthetic())

    device = trial.device
    usual = milliseconds(step, device, repeats)
    with profiled(device) as profiler, torch.profiler.record_function("step"):
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    (whole,) = (e["dur"] / 1e3 for e in events if e.get("cat") == "user_annotation" and e["name"] == "step")
    cuda = device.type == "cuda"
    spans, busy = of_a_gpu(events) if cuda else of_a_cpu(events)
    total = max(usual, busy / 1e3) if cuda else whole
    kinds, names = defaultdict[str, float](float), defaultdict[str, list[Span]](list)
    for span in spans:
        kinds[span.kind] += span.own / 1e3
        names[short(span.name)].append(span)
    kinds[IDLE] = total - busy / 1e3
    rows: list[Row] = [{"case": "the step", "ms": usual, "profiled ms": whole, "calls": len(spans)}]
    rows += [{"case": f"share: {kind}", "ms": ms, "share": ms / total} for kind, ms in _falling(kinds)]
    spent = {name: sum(span.own for span in found) / 1e3 for name, found in names.items()}
    for name, ms in _falling(spent)[:LONGEST]:
        found = names[name]
        rows.append({"case": name, "ms": ms, "calls": len(found), "share": ms / total, "kind": found[0].kind})
    return rows


def of_a_gpu(events: list[dict[str, Any]]) -> tuple[list[Span], float]:
    """Kernels and copies of a Chrome trace, and the microseconds in which any of them ran."""
    device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    updates = _spans(e for e in events if e.get("cat") == "gpu_user_annotation" and e["name"] == _OPTIMIZER)
    found = [Span(e["name"], e["ts"], e["dur"], _kind(e["name"], e["ts"], updates)) for e in device]
    return found, _length(_spans(device))


def of_a_cpu(events: list[dict[str, Any]]) -> tuple[list[Span], float]:
    """Operators of a Chrome trace by their own time, and the microseconds in which any of them ran."""
    operators = sorted((e for e in events if e.get("cat") == "cpu_op"), key=lambda e: (e["tid"], e["ts"], -e["dur"]))
    updates = _spans(e for e in events if e.get("cat") == "user_annotation" and e["name"] == _OPTIMIZER)
    own, around = [e["dur"] for e in operators], list[int]()
    for i, e in enumerate(operators):
        while around and not _within(e, operators[around[-1]]):
            around.pop()
        if around:
            own[around[-1]] -= e["dur"]
        around.append(i)
    found = [
        Span(e["name"], e["ts"], max(0.0, spent), _kind(e["name"], e["ts"], updates))
        for e, spent in zip(operators, own, strict=True)
    ]
    return found, _length(_spans(operators))


def _within(e: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(e["tid"] == other["tid"] and e["ts"] < other["ts"] + other["dur"])


def _kind(name: str, begin: float, updates: list[tuple[float, float]]) -> str:
    if any(first <= begin < last for first, last in updates):
        return _OPTIMIZER
    return next((kind for kind, words in _KINDS.items() if re.search(words, name.lower())), _OTHER)


def short(name: str) -> str:
    """A kernel's name without its types: the function, and the words of its template arguments that tell what it does."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    base, *rest = re.split(r"[<(]", name, maxsplit=1)
    if rest:
        base = base.rsplit("::", 1)[-1]
    telling = list(dict.fromkeys(word for part in rest for word in _TELLING.findall(part)))[:2]
    if base.lower() in _WRAPPERS and telling:
        base, *telling = telling
    return f"{base} [{', '.join(telling)}]"[:90] if telling else base[:90]


def _falling(times: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(times.items(), key=lambda item: -item[1])
