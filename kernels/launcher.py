"""Launch Triton kernels at a fraction of the host cost of Triton's own launch."""

from __future__ import annotations

import functools
import math
import operator
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
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
# Describing a call costs Python 4.3 us. So the last launch, and the one that followed it last time,
# are asked first whether they fit: Dynamo's TensorGuards compares all tensors in C++, in 1.0 us
# (five tensors, host of one H200, torch 2.11, 2026-11-21). They may say no when in doubt.

# TKV_DEBUG=1: an index out of range, else a dropped write or a masked read, is a device assert.
DEBUG = os.environ.get("TKV_DEBUG", "0") == "1"

# What CompiledKernel.run takes is private to Triton. 3.6 ran on a GPU; the others take the same.
_KNOWN_TRITONS = ("3.6", "3.7", "3.8", "3.9")
# Signatures a launcher remembers; a prompt length, say, makes one each.
_MAX_SIGNATURES = 4096


class Launch(NamedTuple):
    """One kernel launch, `kernel[grid](*tensors, *scalars, *constexprs, **options)`, or several.

    `tensors` may hold tuples of tensors and other arguments.
    """

    kernel: JITFunction[Any]
    grid: tuple[int, ...]
    tensors: tuple[Any, ...]
    scalars: tuple[int | float | None, ...]
    constexprs: tuple[Any, ...]
    options: Mapping[str, Any]
    # What the operator returns: tensors that the call allocated.
    out: Tensor | tuple[Tensor, ...] | None = None
    # The launch that follows; tensors that are neither arguments nor outputs are scratch memory.
    then: Launch | None = None


def run(launch: Launch) -> Tensor | tuple[Tensor, ...] | None:
    """Launch through Triton and return the output or outputs."""
    for one in _chain(launch):
        _run(one)
    return launch.out


def _chain(launch: Launch | None) -> Iterator[Launch]:
    while launch is not None:
        yield launch
        launch = launch.then


def _run(launch: Launch) -> Any:
    """Launch through Triton and return the compiled kernel, None where there was nothing to do."""
    if 0 in launch.grid:
        return None
    args = (*launch.tensors, *launch.scalars, *launch.constexprs)
    with torch.cuda.device_of(next(_tensors(launch.tensors))):
        return launch.kernel[launch.grid](*args, **launch.options)


class Launcher:
    """Calls `prepare` once a signature, and launches what it described from then on.

    Args:
        prepare: from the operator's arguments to a `Launch`, a function of their signature.
        check: raises for arguments that do not fit, a function of their signature too.
    """

    def __init__(self, prepare: Callable[..., Launch], check: Callable[..., None]) -> None:
        self._prepare, self._check = prepare, check
        self._bound: dict[Any, _Bound] = {}
        self._last: _Bound | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...] | None:
        bound = last = self._last
        pointers = None
        if last is not None:
            pointers = last.guard(args, kwargs)
            if pointers is None:
                bound = last.next
                pointers = bound.guard(args, kwargs)
        if bound is None or pointers is None:
            signature = _signature(args, kwargs)
            if signature not in self._bound:
                return self._launch_first(signature, args, kwargs)
            bound = self._bound[signature]
            if bound is last:  # whose guard was too strict: of another inference mode, say
                bound.guard = _Guard(args, kwargs)
            elif last is not None:
                last.next = bound
            pointers = [arg.data_ptr() for arg in args if isinstance(arg, Tensor)]
        self._last = bound
        if _is_hooked(bound.kernel):
            return run(self._prepare(*args, **kwargs))
        return bound(pointers)

    def _launch_first(
        self, signature: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | tuple[Tensor, ...] | None:
        self._check(*args, **kwargs)
        # One tensor given for two arguments becomes two: the next call may give two.
        apart = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
        launch = self._prepare(*apart, **kwargs)
        compiled = [_run(one) for one in _chain(launch)]
        if None not in compiled and _knows_triton() and not _has_descriptors(launch):
            if len(self._bound) >= _MAX_SIGNATURES:
                self._bound.clear()
            guard = _Guard(args, kwargs)
            self._bound[signature] = _Bound(launch, compiled, list(_tensors(apart)), guard)
        return launch.out


class _Guard:
    """Tells fast whether a call has the signature of the first one; may say no when in doubt."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        places = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]
        self._tensors = _getter(places)
        tensors = self._tensors(args)
        self._types: tuple[type, ...] | None = None  # a call that is not aligned never fits
        if math.gcd(16, *map(Tensor.data_ptr, tensors)) < 16:
            return
        self._types = tuple(map(type, args))
        self._others = _getter([i for i in range(len(args)) if i not in places])
        self._values, self._kwargs = self._others(args), kwargs
        guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        self._same: Callable[..., bool] = guards.check

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int] | None:
        """Return the pointers of the tensors if the call fits."""
        if (
            tuple(map(type, args)) != self._types
            or kwargs != self._kwargs
            or self._others(args) != self._values
        ):
            return None
        tensors = self._tensors(args)
        if not self._same(*tensors):
            return None
        pointers = [*map(Tensor.data_ptr, tensors)]
        return pointers if math.gcd(16, *pointers) == 16 else None


def _getter(places: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Return what takes the arguments at `places` out of all."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda args: tuple(args[i] for i in places)


class _Slot(int):
    """Stands for a pointer, by its place among those of a call."""


class _Bound:
    """Compiled kernels with all their arguments but the pointers."""

    def __init__(
        self, launch: Launch, compiled: list[Any], given: list[Tensor], guard: _Guard
    ) -> None:
        self.kernel, self.guard = launch.kernel, guard
        self.next = self  # the launch that followed it last time
        self._device = given[0].get_device()
        outs = launch.out if isinstance(launch.out, tuple) else (launch.out,)
        fresh = [out for out in outs if out is not None]
        self._returned = len(fresh)
        known = {id(tensor) for tensor in (*given, *fresh)}
        storages = {tensor.untyped_storage()._cdata for tensor in given}
        for tensor in (t for one in _chain(launch) for t in _tensors(one.tensors)):
            if id(tensor) not in known:  # scratch memory
                assert tensor.untyped_storage()._cdata not in storages, "a view of an argument"
                known.add(id(tensor))
                fresh.append(tensor)
        self._fresh = [
            functools.partial(torch.empty, x.shape, dtype=x.dtype, device=x.device) for x in fresh
        ]
        self._returns_tuple = isinstance(launch.out, tuple)
        slots = {id(tensor): _Slot(i) for i, tensor in enumerate((*given, *fresh))}
        self._kernels = [
            _BoundKernel(one, kernel, slots)
            for one, kernel in zip(_chain(launch), compiled, strict=True)
        ]

    def __call__(self, pointers: list[int]) -> Tensor | tuple[Tensor, ...] | None:
        fresh = [empty() for empty in self._fresh]
        if fresh:
            pointers += map(Tensor.data_ptr, fresh)
        if torch._C._cuda_getDevice() == self._device:
            self._launch(pointers)
        else:
            with torch.cuda.device(self._device):
                self._launch(pointers)
        if self._returns_tuple:
            return tuple(fresh[: self._returned])
        return fresh[0] if self._returned else None

    def _launch(self, pointers: list[int]) -> None:
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        for kernel in self._kernels:
            kernel(stream, pointers)


class _BoundKernel:
    """One compiled kernel with all its arguments but the stream and the pointers."""

    def __init__(self, launch: Launch, compiled: Any, slots: dict[int, _Slot]) -> None:
        self._grid = (*launch.grid, 1, 1)[:3]
        self._run, self._function = _entry(compiled)
        self._pointers = _template(launch.tensors, slots)
        self._rest = (*launch.scalars, *launch.constexprs)
        first, rest = self._pointers[: len(slots)], self._pointers[len(slots) :]
        if {*map(type, first)} == {_Slot} and first == tuple(range(len(slots))):  # all, in order
            self._pointers, self._rest = (), (*rest, *self._rest)

    def __call__(self, stream: int, pointers: list[int]) -> None:
        filled = _fill(self._pointers, pointers) if self._pointers else pointers
        self._run(*self._grid, stream, *self._function, *filled, *self._rest)


def _template(args: tuple[Any, ...], slots: dict[int, _Slot]) -> tuple[Any, ...]:
    """Return `args` with a slot for each tensor."""
    return tuple(
        _template(arg, slots) if isinstance(arg, tuple) else slots.get(id(arg), arg) for arg in args
    )


def _fill(template: tuple[Any, ...], pointers: list[int]) -> tuple[Any, ...]:
    """Return the template with each slot's pointer."""
    return tuple(
        [
            pointers[arg]
            if arg.__class__ is _Slot
            else _fill(arg, pointers)
            if arg.__class__ is tuple
            else arg
            for arg in template
        ]
    )


def _has_descriptors(launch: Launch) -> bool:
    """Return whether a launch takes tensor descriptors, which hold addresses: Triton makes them."""
    args = (arg for one in _chain(launch) for arg in one.tensors)
    return any(hasattr(arg, "block_shape") for arg in args)


def _tensors(args: tuple[Any, ...]) -> Iterator[Tensor]:
    """Yield the tensors among nested arguments."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, tuple):
            yield from _tensors(arg)


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


def _signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    described = [
        (a.dtype, a.shape, a.stride(), a.get_device(), a.data_ptr() % 16)
        if isinstance(a, Tensor)
        else a
        for a in args
    ]
    return (*described, *kwargs.items())


def _is_hooked(kernel: JITFunction[Any]) -> bool:
    """Return whether somebody, a profiler say, wants to see the launches of `kernel`."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    # A chain of hooks has `calls`; a function that was put in its place has not.
    return bool(
        getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or kernel.pre_run_hooks
    )


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
