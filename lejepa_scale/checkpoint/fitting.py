"""Named tensors of a source against an encoder: under which prefix its names are, what timm's own conversion makes of names
and sizes, and what is then missing, unexpected or of another shape. Reads no files."""

from __future__ import annotations

import contextlib
import copy
import io
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import timm
from timm.models import adapt_input_conv
from torch import Tensor

from lejepa_scale.model import Encoder

SHOWN = 4  # names in one message


@dataclass
class Fit:
    """One set of tensors under one prefix, as timm converts it, against what the encoder has."""

    key: str
    prefix: str
    weights: dict[str, Tensor] = field(default_factory=dict)  # what fits, in the encoder's dtypes
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)  # names, with both shapes
    failure: str = ""  # what timm's conversion ended with
    notes: list[str] = field(default_factory=list)

    @property
    def faults(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.shapes)

    @property
    def fits(self) -> bool:
        return bool(self.weights) and not self.faults and not self.failure


class Target:
    """The encoder that weights are for, which may be on the meta device and is not changed.

    leave_out: what neither side need have. image_size: side or sides in pixels that the source's positions stand for.
    """

    def __init__(self, encoder: Encoder, leave_out: list[str], image_size: int | tuple[int, int] | None) -> None:
        self.expected: dict[str, Tensor] = encoder.backbone.state_dict()
        self.leave_out = leave_out
        self.model = copy.copy(encoder.backbone)  # shallow: timm's conversion looks at the attribute that is set here
        if image_size is not None:
            self.model.pretrained_model_args = {"img_size": image_size}
        entrypoint = timm.model_entrypoint(encoder.timm_arguments["model_name"])
        self.filter = getattr(sys.modules[entrypoint.__module__], "checkpoint_filter_fn", None)
        self.channels = encoder.channels

    def fit(self, key: str, prefix: str, source: dict[str, Tensor], others: int) -> Fit:
        """source: what lies under the prefix, by names without it. others: how many tensors of the set lie elsewhere."""
        fit = Fit(key, prefix)
        fit.notes += [f"{key} of the file"] if key else []
        fit.notes += [f"prefix {prefix} stripped"] if prefix else []
        found = self._converted(source, fit)
        out = {name: tensor for name, tensor in source.items() if left_out(name, self.leave_out)}
        ids = {id(tensor) for tensor in out.values()}  # converted under another name, they are left out too
        found = {n: t for n, t in found.items() if not left_out(n, self.leave_out) and id(t) not in ids}
        classifier = [name for name in self._parts("classifier") if name in found and name not in self.expected]
        for name in classifier:
            del found[name]
        self._adapt_channels(found, fit)
        self._compare(found, fit)
        kept = {id(tensor) for tensor in found.values()}
        converted = [n for n, t in source.items() if id(t) not in kept and n not in {*found, *out, *classifier}]
        random = [name for name in self.expected if left_out(name, self.leave_out)]
        kinds = sorted({str(t.dtype) for n, t in found.items() if n in fit.weights and t.dtype != fit.weights[n].dtype})
        for said, names in (
            ("merged or not used by timm's conversion", converted),
            ("classifier not used", classifier),
            ("left out", list(out)),
            ("left at random", random),
        ):
            fit.notes += [f"{said}: {listed(names)}"] if names else []
        fit.notes += [f"{others} other tensors of the file not used"] if others else []
        fit.notes += [f"{', '.join(kinds)} made float32".replace("torch.", "")] if kinds else []
        return fit

    def _converted(self, source: dict[str, Tensor], fit: Fit) -> dict[str, Tensor]:
        """Names and sizes as timm's own loader makes them for this architecture."""
        if self.filter is None:
            return dict(source)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # one of them prints what it tries
                found = dict(self.filter(dict(source), self.model))
        except Exception as error:  # timm's functions raise what they meet: KeyError, RuntimeError of a reshape, ...
            fit.failure = f"{type(error).__name__}: {error}".splitlines()[0]
            return dict(source)
        for name in sorted(found.keys() & source.keys()):
            if found[name].shape != source[name].shape:
                fit.notes.append(f"{name} resized from {_sides(source[name])} to {_sides(found[name])}")
        return found

    def _parts(self, kind: str) -> list[str]:
        """Parameters of the modules that timm calls the model's `classifier` or `first_conv`."""
        named = self.model.pretrained_cfg.get(kind) or ()
        return [f"{n}.{part}" for n in ([named] if isinstance(named, str) else named) for part in ("weight", "bias")]

    def _adapt_channels(self, found: dict[str, Tensor], fit: Fit) -> None:
        """The first convolution for another number of channels, as timm does it."""
        for name in self._parts("first_conv"):
            if name not in found or name not in self.expected or found[name].ndim != 4:
                continue
            before, after = found[name].shape[1], self.expected[name].shape[1]
            if before != after == self.channels:
                found[name] = adapt_input_conv(self.channels, found[name], base_chans=before)
                fit.notes.append(f"{name} adapted from {before} to {after} channels")

    def _compare(self, found: dict[str, Tensor], fit: Fit) -> None:
        required = {name for name in self.expected if not left_out(name, self.leave_out)}
        fit.missing = sorted(required - found.keys())
        fit.unexpected = sorted(found.keys() - required)
        for name in sorted(required & found.keys()):
            given, expected = found[name], self.expected[name]
            if given.shape != expected.shape:
                fit.shapes.append(f"{name}: {_sides(given)} in the source, {_sides(expected)} in the encoder")
            else:
                fit.weights[name] = given.to(expected.dtype)


def left_out(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns is the name, matches it or is a module above it."""
    return any(fnmatchcase(name, pattern) or name.startswith(f"{pattern.rstrip('.')}.") for pattern in patterns)


def below_prefixes(
    tensors: Mapping[str, Tensor], expected: Iterable[str], asked: str | None
) -> dict[str, dict[str, Tensor]]:
    """Prefixes under which a set has the encoder's names, or the one asked for, and what lies there, by names without it.
    Where none has, timm's conversion may know the names as they are: prefix ""."""
    names, counts = set(expected), dict[str, int]()
    for name in tensors:
        parts = name.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in names:
                prefix = "".join(f"{part}." for part in parts[:i])
                counts[prefix] = counts.get(prefix, 0) + 1
    least = max(len(names) / 10, max(counts.values(), default=0) / 2)  # fewer are names that happen to be the same
    copies = [prefix for prefix, count in counts.items() if count >= least]
    chosen = copies or [""]
    if asked is not None:
        chosen = [f"{asked.rstrip('.')}." if asked else ""]
    found = {}
    for prefix in chosen:  # another copy of the encoder, below this one's names, is not part of this one
        nested = tuple(other for other in copies if other != prefix and other.startswith(prefix))
        inside = {n: t for n, t in tensors.items() if n.startswith(prefix) and not n.startswith(nested)}
        if inside:
            found[prefix] = {name.removeprefix(prefix): tensor for name, tensor in inside.items()}
    return found


def listed(names: list[str], separator: str = ", ") -> str:
    """The first few, and how many more there are."""
    return separator.join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _sides(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a number"
