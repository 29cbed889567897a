"""Which sample at which step, without decoding; and whether a log of it is right: every position once, no sample twice in an
epoch, none left out. Judges logs by sets, not by the arithmetic of order.py, which it is there to check."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from lejepa_scale.config import BatchPlan, Data
from lejepa_scale.data.audit.keylog import Header, Record, entries, files_of
from lejepa_scale.data.faults import printable
from lejepa_scale.data.loader import Loader
from lejepa_scale.data.mixture import Mixture
from lejepa_scale.errors import UserError
from lejepa_scale.progress import bar

_SHOWN = 5  # examples of each fault
_WIDTH = 80  # characters of a value


def order_of_steps(
    sources: Mixture, data: Data, plan: BatchPlan, *, seed: int, first: int, last: int
) -> Iterator[tuple[int, list[Record]]]:
    """(step, its samples by position) for steps first .. last - 1: what the loaders of all ranks give, each with
    `data.workers` processes as in training, put together."""
    taken: dict[int, list[Record]] = defaultdict(list)
    for rank in bar("reading the order", range(plan.ranks), unit="rank"):
        with Loader(sources, data, plan, seed=seed, rank=rank, first_step=first, decode=False) as loader:
            for number, batch in enumerate(islice(loader, (last - first) * plan.accumulation)):
                taken[first + number // plan.accumulation] += batch.records
    for step in sorted(taken):
        yield step, sorted(taken[step])


@dataclass
class Log:
    """A key log, whatever number of files and restarts it came in."""

    path: Path
    headers: list[tuple[str, Header]] = field(default_factory=list)  # ("file, line n", header)
    records: dict[int, tuple[int, Record]] = field(default_factory=dict)  # by position, with the step
    repeated: int = 0  # records that were written again after a restart, and agree
    conflicts: list[str] = field(default_factory=list)

    @property
    def global_batch(self) -> int:
        """Samples of a step, over all ranks."""
        return int(self.headers[0][1]["global_batch"])

    @property
    def decoded(self) -> bool:
        """Whether images were read, so that what could not be is marked as replaced."""
        return bool(self.headers[0][1]["decoded"])


def read_log(path: Path, steps: range | None = None) -> Log:
    """Read a run directory or a file, only `steps` of it if given. Raises UserError where there is no log to read."""
    log = Log(path)
    for file in files_of(path):
        for number, entry in entries(file):
            if isinstance(entry, dict):
                log.headers.append((f"{file}, line {number}", entry))
                continue
            if not log.headers:
                raise UserError(f"{file}, line {number}: records come after a header, a line that starts with #.")
            step, record = entry
            if record.source >= len(log.headers[-1][1]["samples"]):
                sources = len(log.headers[-1][1]["samples"])
                raise UserError(
                    f"{file}, line {number} is of source {record.source}, and its header tells of {sources}."
                )
            if steps is not None and step not in steps:
                continue
            before = log.records.setdefault(record.position, entry)
            if before is not entry and before != entry:
                log.conflicts.append(
                    f"position {record.position} was consumed twice, and not as the same sample: {before[1]} in step "
                    f"{before[0]}, {record} in step {step} ({file}, line {number})"
                )
            log.repeated += before is not entry and before == entry
    if not log.records:
        which = "" if steps is None else f" of the steps {steps.start}:{steps.stop}"
        raise UserError(f"the key log {path} holds no sample{which}.")
    return log


def summary(log: Log) -> str:
    """One line: what there is in a log."""
    steps = sorted({step for step, _ in log.records.values()})
    parts = [f"{log.path}: {len(log.records):,} samples in {_span(steps[0], steps[-1], 'step')}"]
    for source in sorted({record.source for _, record in log.records.values()}):
        epochs = [record.epoch for _, record in log.records.values() if record.source == source]
        parts.append(f"{len(epochs):,} of source {source} in {_span(min(epochs), max(epochs), 'epoch')}")
    parts.append(f"written by {len(log.headers)} starts of a rank, {log.repeated:,} samples taken again")
    replaced = [str(record) for _, record in log.records.values() if record.replacement]
    if replaced:
        parts.append(f"{len(replaced)} that could not be read were replaced: {_examples(replaced)}")
    return "; ".join(parts)


def faults(log: Log) -> list[str]:
    """What is wrong with one log, a sentence each; empty where all is well."""
    return [
        *_restarts(log),
        *_examples_of("conflicts", log.conflicts),
        *_gaps(log),
        *_duplicates(log),
        *_omissions(log),
    ]


def _restarts(log: Log) -> Iterator[str]:
    """A run that changed what determines the order."""
    first = log.headers[0][1]
    for place, header in log.headers[1:]:
        changed = [
            f"{key}: {str(first.get(key))[:_WIDTH]} -> {str(value)[:_WIDTH]}"
            for key, value in header.items()
            if first.get(key) != value
        ]
        if changed:
            yield f"the run went on with another order ({place}): {'; '.join(changed)}"
            return


def _gaps(log: Log) -> Iterator[str]:
    batch = log.global_batch
    steps = [step for step, _ in log.records.values()]
    wrong = [f"{r.position} in step {s}" for s, r in log.records.values() if r.position // batch != s]
    if wrong:
        yield f"positions outside their step, for a global batch of {batch}: {_examples(wrong)}"
    first, end = min(steps) * batch, (max(steps) + 1) * batch
    runs = _absent([position for position in log.records if first <= position < end], first, end)
    if runs:
        count = sum(last + 1 - first for first, last in runs)
        shown = [f"{_span(a, b, 'position')} of {_span(a // batch, b // batch, 'step')}" for a, b in runs]
        yield f"omissions: {count:,} of the {end - first:,} positions did not come: {_examples(shown)}"


def _absent(present: Iterable[int], first: int, end: int) -> list[tuple[int, int]]:
    """The runs of numbers from `first` to `end` - 1 that are not there, as (first, last). A log may claim any numbers."""
    runs, expected = [], first
    for number in [*sorted(present), end]:
        if number > expected:
            runs.append((expected, number - 1))
        expected = number + 1
    return runs


def _duplicates(log: Log) -> Iterator[str]:
    where: dict[tuple[int, tuple[int, int, int]], int] = {}
    found = []
    for position, (_, record) in sorted(log.records.items()):
        first = where.setdefault((record.epoch, record.sample), position)
        if first != position:
            found.append(f"{record} at positions {first} and {position}")
    yield from _examples_of("duplicates within an epoch", found)


def _omissions(log: Log) -> Iterator[str]:
    """Samples that had not come by the end of an epoch that the log holds from beginning to end."""
    seen: dict[int, dict[int, dict[tuple[int, int, int], Record]]] = defaultdict(lambda: defaultdict(dict))
    for _, record in log.records.values():
        seen[record.source][record.epoch][record.sample] = record
    for source, epochs in sorted(seen.items()):
        total = log.headers[0][1]["samples"][source]
        whole = range(0 if min(log.records) < log.global_batch else min(epochs) + 1, max(epochs))
        if runs := _absent([epoch for epoch in epochs if epoch in whole], whole.start, max(whole.stop, whole.start)):
            spans = [_span(first, last, "epoch") for first, last in runs]
            yield f"omissions: no sample of source {source} came in {_examples(spans)}"
        known = {sample: record for epoch in epochs.values() for sample, record in epoch.items()}
        for epoch in sorted(epoch for epoch in epochs if epoch in whole):
            came = epochs[epoch]
            if len(came) < total:
                names = [printable(record.name) for sample, record in sorted(known.items()) if sample not in came]
                yield (
                    f"omissions: {total - len(came):,} of the {total:,} samples of source {source} did not come in epoch "
                    + (f"{epoch}, among them {_examples(names)}" if names else f"{epoch}")
                )


def first_difference(one: Log, two: Log) -> str | None:
    """Where two logs part, by position; None where they hold the same samples at the same positions. Replacements of what
    could not be read count where both logs can know of them."""
    both_decoded = one.decoded and two.decoded
    for position in sorted(one.records.keys() | two.records.keys()):
        a, b = one.records.get(position), two.records.get(position)
        if a == b or (a and b and not both_decoded and (a[0], a[1][:-1]) == (b[0], b[1][:-1])):
            continue
        for log, entry, other in ((one, a, b), (two, b, a)):
            if entry is None and other is not None:
                return (
                    f"{log.path} has nothing at position {position} of step {other[0]}, where the other has {other[1]}. "
                    "Logs of different lengths are compared over a part with --steps a:b"
                )
        assert a is not None
        assert b is not None
        return f"at position {position} {one.path} has {a[1]} in step {a[0]}, and {two.path} has {b[1]} in step {b[0]}"
    return None


def _span(first: int, last: int, unit: str) -> str:
    return f"{unit} {first}" if first == last else f"{unit}s {first} to {last}"


def _examples_of(title: str, found: list[str]) -> Iterator[str]:
    if found:
        yield f"{len(found):,} {title}: {_examples(found)}"


def _examples(found: list[str]) -> str:
    return ", ".join(found[:_SHOWN]) + (f", and {len(found) - _SHOWN:,} more" if len(found) > _SHOWN else "")
