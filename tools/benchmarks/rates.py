"""Rates, memory and collectives of a trial's steps, timed in turns with other trials and with a matrix product."""

from __future__ import annotations

import gc
import platform
import resource
import time
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache, partial
from statistics import median

import torch

from benchmarks.features import compute_dtype
from benchmarks.measure import WARM, Row, Work, interleaved, matmul_flops, matrix_product, peak_bytes
from benchmarks.trial import Trial
from lejepa_scale.cost import peak_flops, step_flops
from lejepa_scale.parallel import collectives, process_group

_product = lru_cache(matrix_product)  # chosen once for each precision


def timed(trials: dict[str, Trial], device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of a step ("step") and of its phases, for each of the trials, in turns with one another and with the
    matrix product of their precision, whose FLOP/s are under "product"."""
    phases: dict[str, list[dict[str, float]]] = {name: [] for name in trials}

    def work(name: str, trial: Trial) -> None:
        before = time.process_time()
        trial.step(trial.synthetic())
        spent = trial.phases.read()
        if device.type == "cpu":  # what others of the machine do falls on this least
            spent["CPU"] = 1e3 * (time.process_time() - before)
        phases[name].append(spent)

    for trial in trials.values():
        trial.phases.read()
    collectives.barrier()
    works: dict[str, Work] = {name: partial(work, name, trial) for name, trial in trials.items()}
    products = {name: _product(device, compute_dtype(trial.config)) for name, trial in trials.items()}
    works |= {f"product of {name}": product for name, (product, _) in products.items()}
    times = interleaved(works, device, rounds)
    out = {}
    for name, found in phases.items():
        out[name] = {phase: median(r[phase] for r in found[WARM:]) / 1e3 for phase in found[-1]}
        out[name] |= {"step": times[name] / 1e3, "product": 1e3 * products[name][1] / times[f"product of {name}"]}
    return out


def rates(trial: Trial, seconds: dict[str, float]) -> Row:
    """seconds: of a step, under "step", and of its phases; under "product" the FLOP/s of a matrix product."""
    seconds = dict(seconds)
    product = seconds.pop("product", 0.0)
    config, plan, device = trial.config, trial.plan, trial.device
    images, spent = config.train.global_batch, seconds["step"]
    row: Row = {
        "case": f"{config.model.encoder}, {config.engine.name}, {config.engine.precision}, "
        f"{plan.micro_batch} x {plan.ranks} ranks x {plan.accumulation}",
        "ms": 1e3 * spent,
        "images/s": images / spent,
    }
    work = step_flops(config, plan)
    if work.tokens:
        row["tokens/s"] = plan.ranks * work.tokens / spent
    achieved = work.total / spent
    peak = peak_flops(device)
    row["TFLOP/s a rank"] = achieved / 1e12
    row["MFU"] = achieved / peak if peak else "not measured: no peak known for this device"
    if not product:  # steps were not timed in turns with one
        product = matmul_flops(device, compute_dtype(config))
    row["MFU of a matrix product here"] = achieved / product
    row["matrix product TFLOP/s"] = product / 1e12
    return row | {f"{name} ms": 1e3 * s for name, s in seconds.items() if name != "step"}


def memory(trial: Trial, *, whole_process: bool = False) -> Row:
    """Peak of a step: above what is kept between steps, and on CUDA in all; of a CPU process, what the system saw."""
    working = peak_bytes(lambda: trial.step(trial.synthetic()), trial.device)
    row: Row = {"working MiB": working / 2**20}
    if trial.device.type == "cuda":
        row["peak MiB"] = (trial.held + working) / 2**20
    elif whole_process:
        unit = 1 if platform.system() == "Darwin" else 1024
        row["peak resident MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    return row


def collective_rows(trial: Trial) -> Iterator[Row]:
    """What a rank hands to collectives in a step, counted as they are called."""
    if process_group.world_size() > 1:
        yield {"case": "collectives of a step"} | collective_calls(trial)


def collective_calls(trial: Trial) -> Row:
    with collectives.CountBytes() as counted:
        trial.step(trial.synthetic())
    calls, sizes = Counter[str](), Counter[str]()
    for name, size in counted.calls:
        kind = name.removesuffix("_base")
        calls[kind] += 1
        sizes[kind] += size
    row: Row = {"collectives": calls.total(), "MB": sizes.total() / 1e6}
    return row | {k: v for kind in calls for k, v in ((kind, calls[kind]), (f"{kind} MB", sizes[kind] / 1e6))}


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
