"""Cases measured one by one, each section's in a process of its own, against a deadline: what fails, hangs or leaves its
device unusable costs one case, and another call with the same results file goes on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.measure import Results, Row, describe
from benchmarks.rates import free
from benchmarks.record import Record, revision
from lejepa_scale.errors import UserError

GRACE = 10.0  # seconds that a case has to end in when the time is over
START = 120.0  # seconds for a process to be there with its device
METHODS = ("forkserver", "spawn")  # from a server that has done the imports; or with imports of its own, 5 s and more
DONE, FAILED, UNUSABLE = "done", "failed", "unusable"  # what became of a case: of its rows, and of the device


@dataclass(frozen=True)
class Case:
    """One measurement: its name in its section, and what gives its rows, in a process that may have measured others before.

    work: of the device and the section's rows so far; it travels to that process, as a function of a module or `partial`.
    """

    name: str
    work: Callable[[torch.device, Sequence[Row]], Iterable[Row]]
    limit: float = 120.0  # seconds
    late: bool = False  # after the other cases of all sections


def run(
    sections: dict[str, list[Case]],
    device: torch.device,
    *,
    minutes: float,
    sizes: str,
    command: str,
    path: Path | None = None,
    again: bool = False,
    preload: Sequence[str] = (),
    methods: Sequence[str] = METHODS,
) -> Results:
    """Every section in turn, late cases after all others; what the time does not reach says so.

    sizes, command: added to the machine's description. preload: modules that the processes find imported. methods: of
    starting them, the next one where the device does not bear one. Raises UserError where `path` holds results of something
    else.
    """
    began = time.monotonic()
    deadline = began + 60 * minutes
    processes = Processes(device, preload, methods)
    try:
        machine = processes.machine() | revision() | {"sizes": sizes, "command": command}
        record = Record.opened(path, machine, again=again)
        print(", ".join(f"{k} {v}" for k, v in record.machine.items()), flush=True)
        record.save()
        cut = set[str]()  # each says so once
        first, last = _rounds(sections, record)
        for cases_of, section in [*((first, name) for name in sections), *((last, name) for name in sections)]:
            cases = cases_of[section]
            if section in cut or not cases:
                continue
            if time.monotonic() < deadline:
                _say(f"{time.monotonic() - began:.0f} s of {60 * minutes:.0f}: {section}, {len(cases)} cases")
            for i, case in enumerate(cases):
                if time.monotonic() > deadline:
                    cut.add(section)
                    record.add(section, "", {"case": "rest of the section", "not measured": "out of time"})
                    break
                if not _measure(section, case, record, processes, deadline) and cases_of is first:
                    last[section] = [*cases[i + 1 :], *last[section]]  # what hangs once may hang in the next case too
                    break
            processes.end()  # another section, another process
    finally:
        processes.end()
    return record.results


def _rounds(sections: dict[str, list[Case]], record: Record) -> tuple[dict[str, list[Case]], dict[str, list[Case]]]:
    """What is left of each section to be measured at first, and after all others: late cases, and those that failed before,
    since they may fail again and take long."""
    first, last = dict[str, list[Case]](), dict[str, list[Case]]()
    for section, cases in sections.items():
        left = [case for case in cases if not record.is_done(section, case.name)]
        waits = {case.name: case.late or (section, case.name) in record.failed for case in left}
        first[section] = [case for case in left if not waits[case.name]]
        last[section] = [case for case in left if waits[case.name]]
    return first, last


def _measure(section: str, case: Case, record: Record, processes: Processes, deadline: float) -> bool:
    """One case, in the process that is there or a new one. Returns whether it came to an end."""
    record.begin(section, case.name)
    earlier = [row for row in record.rows if row["section"] == section]
    processes.machine()  # a new one's start is not the case's time
    began = time.monotonic()
    until = min(began + case.limit, deadline + GRACE)
    try:
        outcome = processes.measure(case, earlier, until, lambda row: record.add(section, case.name, row))
    except TimeoutError:
        processes.end()
        if until < began + case.limit:
            record.add(section, case.name, {"case": case.name, "not measured": "out of time"})
        else:
            record.add(section, case.name, _failure(case, f"no end after {case.limit:.0f} s"))
        return False
    except EOFError:
        record.add(section, case.name, _failure(case, f"its process ended: {processes.end()}"))
        return True
    if outcome == UNUSABLE:
        processes.end()
    if outcome == DONE:
        record.finish(section, case.name)
    return True


def _failure(case: Case, reason: str) -> Row:
    return {"case": case.name, "ok": False, "failure": reason}


class Processes:
    """One process at a time, which has the device; this one never touches it."""

    def __init__(self, device: torch.device, preload: Sequence[str], methods: Sequence[str]) -> None:
        self._device, self._preload, self._methods = device, list(preload), list(methods)
        self._process: Any = None
        self._link: Connection | None = None
        self._machine: dict[str, str] = {}

    def machine(self) -> dict[str, str]:
        """As the first process describes it. Raises UserError where none can be started."""
        self._start()
        return self._machine

    def measure(self, case: Case, earlier: list[Row], until: float, tell: Callable[[Row], None]) -> str:
        """What became of a case, whose rows are told as they come. Raises TimeoutError, or EOFError where the process died:
        `end` is to follow both."""
        self._start()
        assert self._link is not None
        try:
            self._link.send((case, earlier))
            while self._link.poll(max(0.0, until - time.monotonic())):
                said = self._link.recv()
                if isinstance(said, str):
                    return said
                tell(said)
        except ConnectionError:
            raise EOFError from None
        raise TimeoutError

    def _start(self) -> None:
        while self._process is None:
            method = self._methods[0]
            context: Any = multiprocessing.get_context(method)
            if method == "forkserver":
                context.set_forkserver_preload(self._preload)
            self._link, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self._device, os.environ.get("PYTHONPATH")))
            surroundings = {
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # by which the server imports
                "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # a server that asks CUDA for devices spoils it for its forks
            }
            nothing = patch.object(sys.modules["__main__"], "__file__", None, create=True)  # of this program to import
            with patch.dict(os.environ, surroundings), nothing:
                self._process.start()
            theirs.close()
            reason = f"nothing heard of it after {START:.0f} s"
            with suppress(EOFError, ConnectionError):
                if self._link.poll(START):
                    said = self._link.recv()
                    if isinstance(said, dict):
                        self._machine = said
                        return
                    reason = said
            self.end()
            if len(self._methods) == 1:
                raise UserError(f"no process could be started that measures on {self._device}: {reason}")
            _say(f"{method}: its process cannot use {self._device} ({reason}); trying {self._methods[1]}.")
            self._methods.pop(0)

    def end(self) -> str:
        """End the process, if there is one, and all that it has started. Returns how it ended."""
        if self._process is None:
            return "never started"
        assert self._link is not None
        with suppress(ConnectionError):
            self._link.send(None)
        self._link.close()
        self._process.join(1)  # one that waits for a case ends by itself, one that has died too
        code = self._process.exitcode
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join(30)
        self._process, self._link = None, None
        if code is None:
            return "killed"
        return signal.Signals(-code).name if code < 0 else f"status {code}"


def _serve(link: Connection, device: torch.device, paths: str | None) -> None:
    """In the process that measures: cases come, rows go, until nobody is there. paths: PYTHONPATH for what it starts."""
    os.setsid()  # it can be ended with all that it has started
    os.environ.pop("PYTHONPATH", None)
    os.environ |= {} if paths is None else {"PYTHONPATH": paths}
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    try:
        if device.type == "cuda":
            torch.zeros(1, device=device)
        else:  # toy sizes: threads that spin for one another would take most of the time
            os.environ["OMP_NUM_THREADS"] = "1"
            torch.set_num_threads(1)
        link.send(describe(device))
    except Exception as error:
        link.send(" ".join(str(error).split())[:300])
        return
    with suppress(EOFError, ConnectionError):
        while (given := link.recv()) is not None:
            case, earlier = given
            link.send(measured(case, device, earlier, link.send))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)


def measured(case: Case, device: torch.device, earlier: Sequence[Row], tell: Callable[[Row], None]) -> str:
    """A case's rows, told as they come, and what became of it. What does not fit the device is a result, any other error a
    failure, after which nothing more may run here if the device is unusable."""
    outcome = DONE
    try:
        for row in case.work(device, earlier):
            tell(row)
    except torch.OutOfMemoryError as error:
        tell({"case": case.name, "not measured": str(error).split(". ")[0]})
    except Exception as error:
        traceback.print_exc()
        outcome = FAILED
        tell(_failure(case, f"{type(error).__name__}: {error}"))
    if usable(device):
        return outcome
    if outcome == DONE:
        tell(_failure(case, "the device does not work any more"))
    return UNUSABLE


def usable(device: torch.device) -> bool:
    """Whether the device still works: some errors leave a CUDA context that answers everything with the same error."""
    try:
        free(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
