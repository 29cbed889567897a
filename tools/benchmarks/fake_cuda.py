"""CUDA code on a machine without CUDA: tensors that say they are on a GPU and hold nothing, and a record of what would make
the host wait for the device, by file and line. Changes a process for its life: for one that is forked."""

from __future__ import annotations

import ctypes
import subprocess
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.cpp_extension import include_paths
from torch.utils.flop_counter import flop_registry

from lejepa_scale.model import encoder
from lejepa_scale.objective import characteristic, sigreg
from lejepa_scale.training import actions

CUDA = torch.device("cuda", 0)
_aten = torch.ops.aten
_READ = {_aten._local_scalar_dense.default, _aten.equal.default}
_SIZED_BY_DATA = {
    _aten.nonzero.default, _aten.masked_select.default, _aten._unique2.default, _aten.unique_dim.default,
    _aten.repeat_interleave.Tensor, _aten.bincount.default,
}  # fmt: skip
_BY_MASK = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
_COPIES = {_aten._to_copy.default, _aten.copy_.default}
# Made memory, or another look at it.
_NO_KERNEL = (
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "_unsafe_view",
    "lift_fresh",
)
_OVERWRITE = {"copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_"}  # what is there is not read
_CHOOSE = {"index_select", "take", "give_backward"}
# A CUDA build of torch asks the driver for contexts in every backward pass on CUDA tensors, and throws where there is none.
# These hooks give the true answer: no device has one.
_NO_DEVICE = """
#include <ATen/detail/CUDAHooksInterface.h>
struct NoDevice : at::CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return false; }
  bool hasCUDA() const override { return false; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
};
extern "C" void no_device() {
  static NoDevice none;
  auto& hooks = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
  *reinterpret_cast<void**>(&hooks) = *reinterpret_cast<void**>(&none);
}
"""


def let_backward_run(folder: Path) -> None:
    """For the life of this process: backward passes of fake CUDA tensors. Needs a C++ compiler."""
    if not torch.version.cuda:
        return
    library = folder / "no_device"
    source = library.with_suffix(".cpp")
    source.write_text(_NO_DEVICE)
    includes = [f"-I{path}" for path in include_paths()]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    words = [
        "c++",
        "-O0",
        "-std=c++20",
        "-shared",
        "-fPIC",
        abi,
        *includes,
        str(source),
        "-o",
        str(library),
        *libraries,
    ]
    subprocess.run(words, check=True, timeout=300)
    ctypes.CDLL(str(library)).no_device()


class Launch(NamedTuple):
    """An operator on the device: at least so many bytes of memory that it reads and writes, and its products' FLOPs; of
    attention over a packed row none, since its lengths lie on the device."""

    phase: str
    name: str
    bytes: int
    flops: int


class Watch(TorchDispatchMode):
    """`waits`: where the host would wait for the device, and why. `launches`: operators, with the phase that is set."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.launches: list[Launch] = []
        self.phase = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = any(x.device.type == "cuda" for x in tensors)
        if func in _READ:
            if on_device:
                self._note(f"{func} reads the device")
            return True if func is _aten.equal.default else 1.0 if tensors[0].is_floating_point() else 0
        if func in _SIZED_BY_DATA and on_device:
            self._note(f"{func} makes a shape that depends on data")
        if func in _BY_MASK and on_device and any(x is not None and x.dtype == torch.bool for x in args[1]):
            self._note(f"{func} by a mask")
        if func is _aten.batch_norm_update_stats.default:  # of which torch has no fake form
            self.launches.append(Launch(self.phase, "batch_norm_update_stats", args[0].nbytes, 0))
            return args[0].new_empty(args[0].shape[1]), args[0].new_empty(args[0].shape[1])
        out = func(*args, **kwargs)
        if func in _COPIES:
            self._look_at_copy(func, args, kwargs, out)
        made = any(isinstance(x, Tensor) and x.device.type == "cuda" for x in tree_leaves(out))
        name = func._schema.name.partition("::")[2]
        if (on_device or made) and func.namespace != "prim" and not func.is_view and name not in _NO_KERNEL:
            flops = None if "varlen" in name else flop_registry.get(func._overloadpacket)
            work = flops(*args, **kwargs, out_val=out) if flops else 0
            self.launches.append(Launch(self.phase, name, _moved_bytes(func, args, kwargs, out), work))
        return out

    def _look_at_copy(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        into, source, given = (out, args[0], ()) if func is _aten._to_copy.default else (args[0], args[1], args[2:])
        between = {source.device.type, into.device.type}
        if between != {"cpu", "cuda"}:
            return
        here = source if source.device.type == "cpu" else into
        if not (given[0] if given else kwargs.get("non_blocking", False)):
            self._note(f"a copy {source.device.type} -> {into.device.type} of {tuple(source.shape)} that is waited for")
        elif not getattr(here, "pinned", False):
            self._note(f"a copy {source.device.type} -> {into.device.type} of pageable memory {tuple(source.shape)}")

    def _note(self, what: str) -> None:
        own = [f for f in traceback.extract_stack() if "lejepa_scale" in f.filename or "/timm/" in f.filename]
        place = f"{Path(own[-1].filename).name}:{own[-1].lineno} ({own[-1].line})" if own else "?"
        self.waits.append(f"{place}: {what}")


def _moved_bytes(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """What an operator has to read and write if nothing is in a cache: every tensor it is given once, but of those that an
    index chooses from what it chooses; and every tensor that it makes or changes once."""
    name, schema = func._schema.name.partition("::")[2], func._schema
    read = written = 0
    for i, argument in enumerate(schema.arguments):
        given = args[i] if i < len(args) else kwargs.get(argument.name)
        size = sum(_held(x) for x in tree_leaves(given) if isinstance(x, Tensor))
        changed = argument.alias_info is not None and argument.alias_info.is_write
        written += size if changed else 0
        read += 0 if changed and (name in _OVERWRITE or argument.kwarg_only) else size
    made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    if not schema.is_mutable:
        written += sum(_held(x) for x in made)
    if name in _CHOOSE:  # the first argument is read where the index says
        read += _held(made[0]) * args[0].element_size() // made[0].element_size() - _held(args[0])
    return read + written


def _held(x: Tensor) -> int:
    """Bytes of memory behind a tensor, which are fewer than its elements where it is expanded."""
    return int(min(x.numel(), x.untyped_storage().nbytes() // x.element_size()) * x.element_size())


class _Event:
    """Of a step ago: what waits for it finds it there."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        pass

    def wait(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _Stream:
    """Beside which nothing runs."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, _: Any) -> None:
        pass

    def wait_event(self, _: Any) -> None:
        pass

    def record_event(self, *_: Any) -> _Event:
        return _Event()

    def synchronize(self) -> None:
        pass


def group_of_nobody() -> DeviceMesh:
    """In place of this process's group, for its life: one rank with a GPU, whose collectives move nothing."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    with patch.object(torch.cuda, "set_device"), patch.object(torch.cuda, "device_count", lambda: 1):
        return init_device_mesh("cuda", (1,), mesh_dim_names=("shard",))


def _moved(self: torch.nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
    """`Module._apply`, which would swap tensors in place: fake ones refuse."""
    for module in self.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                moved = function(parameter.detach())
                module._parameters[name] = torch.nn.Parameter(moved, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = function(buffer)
    return self


def _pinned(tensor: Tensor) -> Tensor:
    tensor.pinned = True  # type: ignore[attr-defined]
    return tensor


@contextmanager
def pretended() -> Iterator[Watch]:
    """Inside, tensors are fake, and may be on CUDA; what the host would wait for is noted."""
    empty = torch.empty

    def page_locked(*args: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        return _pinned(empty(*args, **options)) if pin_memory else empty(*args, **options)

    def draw(seed: int, step: int, m: int, d: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.randn(m, d, device=device, dtype=dtype)

    kernels = characteristic.Arithmetic(  # shapes of the two, a launch each
        lambda p, dt, knots: p.new_zeros(2, knots - 1, len(p)), lambda p, w, dt: torch.zeros_like(p)
    )
    stand_ins: list[tuple[Any, str, Any]] = [
        (torch.nn.Module, "_apply", _moved),
        (torch.Tensor, "pin_memory", lambda self: _pinned(self.clone())),
        (torch, "empty", page_locked),
        (torch, "Event", _Event),
        (torch.cuda, "Event", _Event),
        (torch.cuda, "Stream", _Stream),
        (torch.cuda, "current_stream", lambda *_: _Stream()),
        (torch.cuda, "stream", lambda _: nullcontext()),
        (torch.cuda, "current_device", lambda: 0),
        (torch.Tensor, "record_stream", lambda *_: None),
        (torch.nn.utils.clip_grad, "_has_foreach_support", lambda *_: True),  # which asks for tensors of no other class
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        (sigreg, "_draw", draw),
        (characteristic, "_triton", lambda: kernels),
        (encoder, "choose_backend", lambda *_, **__: "varlen"),
        (actions, "peak_flops", lambda device: None),
    ]
    with ExitStack() as stack:
        for owner, name, stand_in in stand_ins:
            stack.enter_context(patch.object(owner, name, stand_in))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(Watch())
