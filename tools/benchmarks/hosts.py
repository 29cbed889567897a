"""Two hosts on one machine: each with its own network, processes, name and shared memory (Linux namespaces), joined by a
link that can be cut, and one file system. A run across both, and what becomes of it when the link or a host goes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.faults import small_run
from benchmarks.measure import Row
from lejepa_scale.errors import UserError

_DEVICE, _NETWORK, _PORT = "link0", "10.77.0", 29500
_BEGUN, _MORE = 6, 6  # steps before something happens, and that the next start takes
_START_SECONDS, _STOP_SECONDS = 240.0, 200.0
_MINUTES = 0.25  # engine.timeout_minutes of what is cut


@dataclass
class Host:
    """A set of namespaces, held open by a process that sleeps."""

    number: int
    keeper: subprocess.Popen[bytes]
    init: int  # the process that is the first of its host
    logs: list[Path] = field(default_factory=list)
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"{_NETWORK}.{self.number + 1}"

    def inside(self, words: Sequence[str]) -> list[str]:
        return ["nsenter", "-t", str(self.init), "--net", "--pid", "--mount", "--uts", *words]

    def do(self, *words: str) -> None:
        subprocess.run(self.inside(words), check=True, capture_output=True)

    def link(self, state: str) -> None:
        """up or down."""
        self.do("ip", "link", "set", _DEVICE, state)

    def start(self, words: Sequence[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            self.inside(words), stdout=log.open("wb"), stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        self.logs.append(log)
        self.started.append(process)
        return process

    def processes(self) -> list[psutil.Process]:
        """What was started here, and what that has started."""
        found = []
        for started in self.started:
            with suppress(psutil.Error):
                found += psutil.Process(started.pid).children(recursive=True)
        return found

    def lose(self) -> None:
        """The kernel ends whatever runs in a namespace whose first process is killed."""
        with suppress(psutil.Error):
            psutil.Process(self.init).kill()


@contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Raises UserError where the system lets nobody make namespaces."""
    with ExitStack() as stack:
        found = [_host(number, stack) for number in range(2)]
        ends = [f"{_DEVICE}-{number}" for number in range(2)]
        subprocess.run(["ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1]], check=True)
        for host, end in zip(found, ends, strict=True):
            subprocess.run(["ip", "link", "set", end, "netns", str(host.init)], check=True)
            host.do("ip", "link", "set", end, "name", _DEVICE)
            host.do("ip", "addr", "add", f"{host.address}/24", "dev", _DEVICE)
            host.link("up")
        yield found


def _host(number: int, stack: ExitStack) -> Host:
    names = stack.enter_context(tempfile.NamedTemporaryFile("w", prefix="hosts-"))
    names.write("127.0.0.1 localhost\n" + "".join(f"{_NETWORK}.{i + 1} host{i}\n" for i in range(2)))
    names.flush()
    first = " && ".join(
        [
            f"hostname host{number}", "mount -t tmpfs tmpfs /dev/shm", f"mount --bind {names.name} /etc/hosts",
            "mount --bind /dev/null /etc/resolv.conf",  # a server that answers nothing would hold up torch's store
            "ip link set lo up", "echo ready", "exec sleep 3600",
        ]
    )  # fmt: skip
    words = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--mount", "--uts", "bash", "-c", first]
    keeper = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    assert keeper.stdout is not None
    assert keeper.stderr is not None
    if not keeper.stdout.readline():
        raise UserError(f"no host can be made here (unshare, ip; as root): {keeper.stderr.read().decode().strip()}")
    (init,) = psutil.Process(keeper.pid).children()
    # the network outlives the host, so that the other end of its link does
    stack.callback(os.close, os.open(f"/proc/{init.pid}/ns/net", os.O_RDONLY))
    stack.callback(_end, init)
    return Host(number, keeper, init.pid)


def _end(process: psutil.Process) -> None:
    with suppress(psutil.Error):
        process.kill()


Command = Callable[[Host], list[str]]


def _torchrun(host: Host) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={host.number}", "--nproc-per-node=1",
        f"--master-addr={_NETWORK}.1", f"--master-port={_PORT}", "-m", "lejepa_scale", "train",
    ]  # fmt: skip


def _elastic(nodes: str) -> Command:
    def words(host: Host) -> list[str]:
        return [
            sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", "--nproc-per-node=1", "--max-restarts=3",
            "--rdzv-backend=c10d", f"--rdzv-endpoint={_NETWORK}.1:{_PORT}", "--rdzv-id=run",
            f"--local-addr={host.address}", "--rdzv-conf=last_call_timeout=5,keep_alive_interval=2,keep_alive_max_attempt=3",
            "-m", "lejepa_scale", "train",
        ]  # fmt: skip

    return words


def _deepspeed(hostfile: Path) -> Command:
    def words(host: Host) -> list[str]:
        return [
            sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--no_ssh",
            f"--node_rank={host.number}", f"--master_addr={_NETWORK}.1", f"--master_port={_PORT}", "--module",
            "lejepa_scale", "train",
        ]  # fmt: skip

    return words


@dataclass(frozen=True)
class Case:
    """What is done to a run across two hosts."""

    name: str
    launcher: str
    happens: Callable[[list[Host]], None]
    alone: bool = False  # it is to go on by itself, for `_MORE` steps


def _nothing(hosts: list[Host]) -> None:
    pass


def _cut(hosts: list[Host]) -> None:
    hosts[1].link("down")


def _lost(hosts: list[Host]) -> None:
    """As without power: nothing says goodbye."""
    hosts[1].link("down")
    hosts[1].lose()


def _rank_killed(hosts: list[Host]) -> None:
    """The trainer on the second host, not its launcher."""
    for process in hosts[1].processes():
        with suppress(psutil.Error):
            words = process.cmdline()
            if "lejepa_scale" in words and "torch.distributed.run" not in words and process.environ().get("RANK"):
                process.kill()
                return
    raise UserError("no trainer was found on the second host.")


CASES = (
    Case("finishes", "torchrun", _nothing),
    Case("the link is cut", "torchrun", _cut),
    Case("a host is lost", "torchrun", _lost),
    Case("a rank is killed, --max-restarts", "torchrun, 2 nodes", _rank_killed, alone=True),
    Case("a host is lost, --nnodes 1:2", "torchrun, 1 to 2 nodes", _lost, alone=True),
    Case("finishes", "deepspeed", _nothing),
    Case("the link is cut", "deepspeed", _cut),
)


def measure(only: Sequence[str]) -> Iterator[Row]:
    """A row for each case, or those in whose names one of `only` occurs. Raises UserError where there can be no hosts."""
    for case in CASES:
        if not only or any(part in f"{case.name} {case.launcher}" for part in only):
            with tempfile.TemporaryDirectory() as folder, two_hosts() as hosts:
                yield _row(case, Path(folder), hosts)


def _row(case: Case, folder: Path, hosts: list[Host]) -> Row:
    config, run = small_run.recipe(folder, small_run.shards(folder / "images")), folder / "run"
    hostfile = folder / "hostfile"
    hostfile.write_text("host0 slots=1\nhost1 slots=1\n")
    words: Command = {
        "torchrun": _torchrun, "torchrun, 2 nodes": _elastic("2"), "torchrun, 1 to 2 nodes": _elastic("1:2"),
        "deepspeed": _deepspeed(hostfile),
    }[case.launcher]  # fmt: skip
    finishing = case.happens is _nothing
    steps = 3 * _BEGUN if finishing else 10**6
    more = ["checkpoint.every=4", f"engine.timeout_minutes={_MINUTES}", f"train.steps={steps}"]
    started = _start(words, hosts, config, more, folder)
    _wait_for(run, _BEGUN, started, hosts)
    before, began = small_run.last_step(run), time.monotonic()
    case.happens(hosts)
    row: Row = {"case": case.name, "launcher": case.launcher}
    if case.alone:
        _wait_for(run, before + _MORE, started[:1], hosts)
        row |= {"seconds until it goes on": round(time.monotonic() - began, 1), "step then": small_run.last_step(run)}
        (run / "stop").touch()
    ends = [_ended(process, began) for process in started]
    row |= {
        "exit": ", ".join(str(status) for status, _ in ends),
        "seconds to end": ", ".join(f"{seconds:.1f}" for _, seconds in ends),
        "said": " | ".join(small_run.said(host.logs[-1]) for host in hosts),
    }
    if not finishing and not case.alone:
        row |= _again(case, words, folder, config, hosts)
    return row | {"samples lost or repeated": small_run.audited(run), "steps": small_run.last_step(run)}


def _again(case: Case, words: Command, folder: Path, config: Path, hosts: list[Host]) -> Row:
    """The link mended, or another host in the place of the lost one: the same command."""
    run = folder / "run"
    saved = small_run.saved_step(run)
    with ExitStack() as stack:
        if case.happens is _lost:
            stack.enter_context(_ended_hosts(hosts))
            hosts = stack.enter_context(two_hosts())
        else:
            hosts[1].link("up")
        began = time.monotonic()
        more = ["checkpoint.every=4", f"train.steps={saved + _MORE}"]
        started = _start(words, hosts, config, more, folder)
        ends = [_ended(process, began) for process in started]
    return {"went on from step": saved, "exit then": ", ".join(str(status) for status, _ in ends)}


@contextmanager
def _ended_hosts(hosts: list[Host]) -> Iterator[None]:
    for host in hosts:
        host.lose()
    time.sleep(0.5)
    yield


def _start(
    words: Command, hosts: list[Host], config: Path, overrides: Sequence[str], folder: Path
) -> list[subprocess.Popen[bytes]]:
    environment = small_run.environment({"GLOO_SOCKET_IFNAME": _DEVICE, "NCCL_SOCKET_IFNAME": _DEVICE})
    return [
        host.start(
            [*words(host), "--config", str(config), *overrides],
            folder / f"log{host.number}-{len(host.logs)}-{time.monotonic_ns()}",
            environment,
        )
        for host in hosts
    ]


def _wait_for(run: Path, step: int, started: Sequence[subprocess.Popen[bytes]], hosts: list[Host]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while small_run.last_step(run) < step:
        if time.monotonic() > deadline or all(process.poll() is not None for process in started):
            said = " | ".join(host.logs[-1].read_text(errors="replace")[-800:] for host in hosts)
            raise UserError(f"a run across two hosts has not come to step {step}: {said}")
        time.sleep(0.1)


def _ended(process: subprocess.Popen[bytes], began: float) -> tuple[int | str, float]:
    return small_run.ended(process, _STOP_SECONDS), time.monotonic() - began
