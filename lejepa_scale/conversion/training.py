"""A whole training state on disk: weights, averages, moments and buffers by name, whatever trainer wrote it, and as a
checkpoint of ours. Tensors are read one by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from lejepa_scale.checkpoint import Progress, Saved
from lejepa_scale.checkpoint.encoder import PREFIX
from lejepa_scale.checkpoint.files import Entry, Written, write_safetensors, write_text
from lejepa_scale.checkpoint.layout import Layout, Part
from lejepa_scale.checkpoint.places import Place
from lejepa_scale.checkpoint.saved import (
    CONFIG,
    INDEX,
    MARKER,
    PROBE,
    STATE,
    file_of,
    index_text,
    state_text,
    title,
    verify,
)
from lejepa_scale.config import Config, dump, load_config, recorded
from lejepa_scale.conversion.model import Lazy, Model, at_hand, finite
from lejepa_scale.engine.base import AVERAGE, KINDS_OF_MOMENTS, MOMENTS, MOMENTUM, VALUE
from lejepa_scale.errors import UserError
from lejepa_scale.model import build, check

OURS = (STATE, CONFIG)  # what goes beside a state in another format, so that it can come back


@dataclass(frozen=True)
class TrainingState:
    """tensors: of every kind (VALUE, KINDS_OF_MOMENTS, AVERAGE) by the module's names; buffers are under VALUE and AVERAGE.
    texts: state.json and config.yaml of a run of ours, which a state in another format keeps beside it."""

    where: str
    tensors: dict[str, dict[str, Lazy]]
    buffers: tuple[str, ...]
    progress: Progress
    texts: dict[str, str]
    probe: dict[str, Tensor]

    def each(self) -> Iterator[tuple[str, str, Lazy]]:
        """Kind, name and tensor of all."""
        return ((kind, name, lazy) for kind, tensors in self.tensors.items() for name, lazy in tensors.items())


def of_checkpoint(checkpoint: Place) -> TrainingState:
    """A checkpoint of ours. Raises UserError where it is damaged."""
    verify(checkpoint)
    saved = Saved(checkpoint)
    moments = [kind for kind in KINDS_OF_MOMENTS if saved.shapes_of(kind)]
    kinds = [VALUE, *moments, *([AVERAGE] if saved.averaged else ())]
    tensors = {
        kind: {
            name: Lazy(shape, saved.dtype(name, kind), partial(saved.whole, name, kind))
            for name, shape in saved.shapes_of(kind).items()
        }
        for kind in kinds
    }
    texts = {name: (checkpoint / name).read_text() for name in OURS}
    return TrainingState(str(checkpoint), tensors, tuple(saved.buffers), saved.progress, texts, saved.probe())


def of_encoder(model: Model, config: Config) -> TrainingState:
    """The beginning of a run: the weights that its seed draws, and in their place the encoder's."""
    torch.manual_seed(config.run.seed)
    module = build(config)
    tensors = {n: at_hand(t.detach()) for n, t in module.state_dict().items() if not n.startswith(PREFIX)}
    tensors |= {f"{PREFIX}{name}": lazy for name, lazy in model.tensors.items()}
    progress = Progress(0, "")
    texts = {STATE: json.dumps(asdict(progress)), CONFIG: dump(config)}
    return TrainingState(model.where, {VALUE: tensors}, buffers_of(module), progress, texts, {})


def buffers_of(module: nn.Module) -> tuple[str, ...]:
    """Names of what is saved and not trained."""
    return tuple(sorted(module.state_dict().keys() - dict(module.named_parameters()).keys()))


@dataclass(frozen=True)
class Counters:
    """What a foreign state says of itself."""

    step: int
    updates: int


def texts_of(folder: Path, config: Path | None, said: Counters | None = None) -> dict[str, str]:
    """state.json and config.yaml beside a state; where `config` is given, that configuration and what the state says of
    itself. The order of data before is then unknown: step N goes on with the samples that are N-th. Without moments the
    optimizer begins anew. Raises UserError where a file is no text."""
    try:
        texts = {name: (folder / name).read_text() for name in OURS if (folder / name).exists()}
    except ValueError as error:  # no UTF-8
        raise UserError(f"{folder} holds a damaged {' or '.join(OURS)}: {error}.") from error
    if config is not None and said is not None:
        progress = asdict(Progress(said.step, "", updates=said.updates))
        run = load_config(config, [])
        texts = {STATE: json.dumps({**progress, "buffers": buffers_of(check(run))}), CONFIG: dump(run)}
    return texts


def expect_model(state: TrainingState) -> None:
    """Raises UserError where the names and shapes are not those of the configured module."""
    module = check(recorded(state.texts[CONFIG], origin=CONFIG))
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: lazy.shape for name, lazy in state.tensors[VALUE].items()}
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        raise UserError(
            f"{state.where} is not a state of the configured model: {len(wrong)} tensors are missing, left over or of "
            f"another shape ({', '.join(wrong[:4])}{', ...' if len(wrong) > 4 else ''})."
        )


def rebuilt(where: str, tensors: dict[str, dict[str, Lazy]], texts: Mapping[str, str]) -> TrainingState:
    """A state out of another format, with the texts that lie beside it. Raises UserError where these are missing, or moments
    are not those of the weights."""
    try:
        said = json.loads(texts[STATE])
        known = {name: said[name] for name in asdict(Progress(0, "")) if name in said}
        progress, buffers = Progress(**known), tuple(map(str, said.get("buffers", ())))
        assert CONFIG in texts
    except (KeyError, ValueError, TypeError, AssertionError) as error:
        raise UserError(
            f"{where} holds no {STATE} and {CONFIG} of a run, as `lejepa convert` puts beside a training state: copy them "
            "out of a checkpoint of the run, or name its configuration with --config."
        ) from error
    values = {name: lazy.shape for name, lazy in tensors.get(VALUE, {}).items() if name not in buffers}
    muons = {name: lazy.shape for name, lazy in tensors.get(MOMENTUM, {}).items()}
    for kind in MOMENTS:
        moments = {name: lazy.shape for name, lazy in tensors.get(kind, {}).items()} | muons
        if moments and moments != values:
            wrong = sorted(moments.keys() ^ values.keys()) or sorted(n for n in values if moments[n] != values[n])
            raise UserError(f"{where}: {kind} is not there for every weight, in its shape: {', '.join(wrong[:4])}.")
    if not values:
        raise UserError(f"{where} holds no weights.")
    return TrainingState(where, tensors, buffers, progress, dict(texts), {})


def write_checkpoint(state: TrainingState, run_dir: Path, told: Callable[[int], object]) -> int:
    """A run directory that holds the state as its one checkpoint, from which `lejepa train` with the run's configuration
    goes on; number of tensors."""
    folder = run_dir / "checkpoints" / f"step_{state.progress.step:08d}"
    folder.mkdir(parents=True)
    values = state.tensors[VALUE]
    shapes = {name: lazy.shape for name, lazy in values.items() if name not in state.buffers}
    layout = Layout(1, shapes, {name: (Part(0, 0, prod(shape)),) for name, shape in shapes.items()})
    kinds = list(state.tensors)
    files: dict[str, list[Entry]] = {}
    for name in values:  # as a run writes them: all kinds of a tensor side by side
        for kind in kinds:
            if name in state.tensors[kind]:
                lazy = state.tensors[kind][name]
                read = partial(_finite, name, lazy, told)
                files.setdefault(file_of(kind, 0, 1), []).append(Entry(title(kind, name), lazy.shape, lazy.dtype, read))
    written: dict[str, Written] = {name: write_safetensors(folder / name, entries) for name, entries in files.items()}
    if state.probe:
        entries = [Entry.of(name, tuple(tensor.shape), tensor) for name, tensor in state.probe.items()]
        written[PROBE] = write_safetensors(folder / PROBE, entries)
    moments = MOMENTS[0] in kinds
    progress = replace(state.progress, averaged=state.progress.averaged if AVERAGE in kinds else 0)
    if not moments:
        progress = replace(progress, updates=0)
    buffers = {name: values[name].shape for name in state.buffers}
    texts = {
        INDEX: index_text(layout, buffers, kinds, state.tensors.get(MOMENTUM, ())),
        STATE: state_text(progress, ranks=1, torch=torch.__version__),
        CONFIG: state.texts[CONFIG],
    }
    written |= {name: write_text(folder / name, text) for name, text in texts.items()}
    write_text(folder / MARKER, json.dumps({name: asdict(row) for name, row in written.items()}, indent=1))
    (run_dir / CONFIG).write_text(state.texts[CONFIG])
    return sum(map(len, files.values()))


def texts_beside(state: TrainingState) -> dict[str, str]:
    """What is written beside a state in another format."""
    said = {**json.loads(state.texts[STATE]), "buffers": list(state.buffers)}
    return {STATE: json.dumps(said, indent=1), CONFIG: state.texts[CONFIG]}


def _finite(name: str, lazy: Lazy, told: Callable[[int], object]) -> Tensor:
    tensor = finite(name, lazy.read())
    told(tensor.nbytes)
    return tensor
