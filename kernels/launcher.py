"""Launch Triton kernels at a fraction of the host cost of Triton's own launch."""

from __future__ import annotations

import functools
import operator
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards
from triton import knobs
from triton.runtime.jit import JITFunction

# Note [Launching by signature]
# Triton's launch binds and specialises every argument anew: each pointer's alignment, each integer
# being 1 or a multiple of 16, each constexpr. What `prepare` makes of a call, checks included, and
# what Triton makes of that depend on nothing but the call's signature: dtype, shape, strides,
# device and alignment of its tensors, and its other arguments. So the first call of a signature
# goes through Triton, which returns the compiled kernel; later calls launch that kernel with the
# arguments of the first, but for the pointers. No kernel chooses a key of its own.
#
# Describing a call costs Python 4.3 us. The launches used last are therefore asked first whether
# they fit: Dynamo's TensorGuards compares all tensors in C++, in 1.0 us (five tensors, host of one
# H200, torch 2.11, 2026-11-21). They may say no when in doubt.

# TKV_DEBUG=1: an index out of range, else a dropped write or a masked read, is a device assert.
DEBUG = os.environ.get("TKV_DEBUG", "0") == "1"

# What CompiledKernel.run takes is private to Triton. 3.6 ran on a GPU; the others take the same.
_KNOWN_TRITONS = ("3.6", "3.7", "3.8", "3.9")
# Signatures a launcher remembers; a prompt length, say, makes one each.
_MAX_SIGNATURES = 4096
# Launches that are asked first: a model has few that alternate.
_MAX_RECENT = 4


class Launch(NamedTuple):
    """One kernel launch: `kernel[grid](*tensors, *scalars, *constexprs, **options)`."""

    kernel: JITFunction[Any]
    grid: tuple[int, ...]
    tensors: tuple[Tensor | None, ...]
    scalars: tuple[int | float, ...]
    constexprs: tuple[Any, ...]
    options: Mapping[str, Any]
    # Those of `tensors` which the call allocated, as the operator returns them.
    out: Tensor | tuple[Tensor, ...] | None = None


def run(launch: Launch) -> Tensor | tuple[Tensor, ...] | None:
    """Launch through Triton and return the output or outputs."""
    _run(launch)
    return launch.out


def _run(launch: Launch) -> Any:
    """Launch through Triton and return the compiled kernel, None where there was nothing to do."""
    if 0 in launch.grid:
        return None
    args = (*launch.tensors, *launch.scalars, *launch.constexprs)
    with torch.cuda.device_of(next(t for t in launch.tensors if t is not None)):
        return launch.kernel[launch.grid](*args, **launch.options)


class Launcher:
    """Calls `prepare` once a signature, and launches what it described from then on.

    Args:
        prepare: from the operator's arguments to a `Launch`, a function of their signature.
        check: raises for arguments that do not fit, a function of their signature too.
    """

    def __init__(self, prepare: Callable[..., Launch], check: Callable[..., None]) -> None:
        self._prepare, self._check = prepare, check
        self._bound: dict[Any, _BoundLaunch] = {}
        self._recent: list[_BoundLaunch] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...] | None:
        for bound in self._recent:
            if bound.guard.fits(args, kwargs):
                break
        else:
            signature = _signature(args, kwargs)
            if signature not in self._bound:
                return self._launch_first(signature, args, kwargs)
            bound = self._bound[signature]
            self._recent = [bound, *(x for x in self._recent if x is not bound)][:_MAX_RECENT]
        if _is_hooked(bound.kernel):
            return run(self._prepare(*args, **kwargs))
        return bound(args)

    def _launch_first(
        self, signature: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | tuple[Tensor, ...] | None:
        self._check(*args, **kwargs)
        guard = _Guard(args, kwargs)
        # One tensor given for two arguments becomes two: the next call may give two.
        args = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
        launch = self._prepare(*args, **kwargs)
        compiled = _run(launch)
        if compiled is not None and _knows_triton():
            if len(self._bound) >= _MAX_SIGNATURES:
                self._bound.clear()
            self._bound[signature] = _BoundLaunch(launch, compiled, args, guard)
        return launch.out


class _Guard:
    """Tells fast whether a call has the signature of the first one; may say no when in doubt."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._length, self._kwargs = len(args), kwargs
        self._count = next((i for i, a in enumerate(args) if not isinstance(a, Tensor)), len(args))
        tensors, self._others = args[: self._count], args[self._count :]
        guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        self._same: Callable[..., bool] = guards.check
        if any(isinstance(arg, Tensor) for arg in self._others) or not _aligned(tensors):
            self._same = lambda *tensors: False  # these are told apart by the signature alone

    def fits(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        count = self._count
        return (
            len(args) == self._length
            and self._same(*args[:count])
            and args[count:] == self._others
            and kwargs == self._kwargs
            and _aligned(args[:count])
        )


class _BoundLaunch:
    """A compiled kernel with all its arguments but the pointers."""

    def __init__(self, launch: Launch, compiled: Any, args: tuple[Any, ...], guard: _Guard) -> None:
        self.kernel, self.guard = launch.kernel, guard
        self._device = next(t for t in launch.tensors if t is not None).get_device()
        self._grid = (*launch.grid, 1, 1)[:3]
        self._run, self._function = _entry(compiled)
        self._rest = (*launch.scalars, *launch.constexprs)
        outs = launch.out if isinstance(launch.out, tuple) else (launch.out,)
        self._outs = [
            functools.partial(torch.empty, out.shape, dtype=out.dtype, device=out.device)
            for out in outs
            if out is not None
        ]
        self._returns_tuple = isinstance(launch.out, tuple)
        # Where each kernel pointer comes from: an argument, an output or nothing.
        given = (*args, *outs, None)
        self._sources = [_index(given, tensor) for tensor in launch.tensors]

    def __call__(self, args: tuple[Any, ...]) -> Tensor | tuple[Tensor, ...] | None:
        outs = [empty() for empty in self._outs] if self._outs else ()
        given = (*args, *outs, None)
        pointers = [t if (t := given[i]) is None else t.data_ptr() for i in self._sources]
        if torch._C._cuda_getDevice() == self._device:
            self._launch(pointers)
        else:
            with torch.cuda.device(self._device):
                self._launch(pointers)
        if self._returns_tuple:
            return tuple(outs)
        return outs[0] if outs else None

    def _launch(self, pointers: list[int | None]) -> None:
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        self._run(*self._grid, stream, *self._function, *pointers, *self._rest)


def _entry(compiled: Any) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """Return what launches a compiled kernel, and what it takes between stream and arguments."""
    run, hooks = compiled.run, (None, None, None)  # a hooked launch goes through Triton
    if triton.__version__.startswith("3.6.") and not (
        run.global_scratch_size or run.profile_scratch_size
    ):
        # `run` is Python that allocates scratch, if any, and calls this.
        modes = (run.launch_cooperative_grid, run.launch_pdl, None, None)
        return run.launch, (compiled.function, *modes, compiled.packed_metadata, *hooks)
    return run, (compiled.function, compiled.packed_metadata, *hooks)


def _aligned(tensors: tuple[Tensor, ...]) -> bool:
    return functools.reduce(operator.or_, map(Tensor.data_ptr, tensors), 0) % 16 == 0


def _signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    described = [
        (a.dtype, a.shape, a.stride(), a.get_device(), a.data_ptr() % 16)
        if isinstance(a, Tensor)
        else a
        for a in args
    ]
    return (*described, *kwargs.items())


def _index(given: tuple[Any, ...], tensor: Tensor | None) -> int:
    return next(i for i, candidate in enumerate(given) if candidate is tensor)


def _is_hooked(kernel: JITFunction[Any]) -> bool:
    """Return whether somebody, a profiler say, wants to see the launches of `kernel`."""
    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    return any(getattr(hook, "calls", hook) for hook in hooks) or bool(kernel.pre_run_hooks)


@functools.cache
def _knows_triton() -> bool:
    """Return whether compiled kernels may be launched directly; warn once where not."""
    if torch.version.hip is not None:
        return False
    known: bool = triton.__version__.startswith(tuple(f"{version}." for version in _KNOWN_TRITONS))
    if not known:
        warnings.warn(
            f"torch_tkv launches its kernels directly with Triton {', '.join(_KNOWN_TRITONS)}; "
            f"with {triton.__version__} it uses Triton's own launch, which costs the host more",
            stacklevel=2,
        )
    return known
