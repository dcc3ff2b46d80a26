"""Launch Triton kernels at a fraction of the host cost of Triton's own launch."""

from __future__ import annotations

import functools
import math
import operator
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

# Importing torch_tkv imports this module and must not import Triton, which functions do below.
if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction

# Note [Launching by signature]
# Triton's launch binds and specialises every argument anew: each pointer's alignment, each integer
# being 1 or a multiple of 16, each constexpr. What `prepare` makes of a call, checks included, and
# what Triton makes of that depend on nothing but the call's signature: dtype, shape, strides,
# device and alignment of its tensors, whether autograd would record them, and its other arguments.
# So the first call of a signature goes through Triton, which returns the compiled kernel; later
# calls launch that kernel with the arguments of the first, but for the pointers. No kernel chooses
# a key of its own.
#
# Describing a call costs Python more than 4 us. So the last launch, and the one that followed it
# last time, are asked first whether they fit: Dynamo's TensorGuards compares all tensors in C++, in
# 1.0 us (five tensors, host of one H200, torch 2.11, 2026-11-21). They may say no when in doubt.

# TKV_DEBUG=1: an index out of range, else a dropped write or a masked read, is a device assert.
DEBUG = os.environ.get("TKV_DEBUG", "0") == "1"

# What CompiledKernel.run takes is private to Triton. 3.6 ran on a GPU; the others take the same.
_KNOWN_TRITONS = ("3.6", "3.7", "3.8", "3.9")
# Signatures a launcher remembers; a prompt length, say, makes one each.
_MAX_SIGNATURES = 4096


class Launch(NamedTuple):
    """One kernel launch, `kernel[grid](*tensors, *scalars, *constexprs, **options)`, or several.

    `tensors` may hold tuples of tensors and other arguments; `scalars` may hold tuples and
    constants, of which the compiled kernel has no parameter although the launch takes them.
    """

    kernel: JITFunction[Any]
    grid: tuple[int, ...]
    tensors: tuple[Any, ...]
    scalars: tuple[Any, ...]
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


# Takes the arguments of a call; returns the pointers of its tensors if it fits, else None.
_Guard: TypeAlias = Callable[[tuple[Any, ...], dict[str, Any]], list[int] | None]


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
            expected, bound = bound, self._bound.get(signature)
            if bound is None:
                return self._launch_first(signature, args, kwargs)
            if bound is last or bound is expected:  # too strict: of another inference mode, say
                bound.guard = _guard(args, kwargs)
            if last is not None:
                last.next = bound
            pointers = [arg.data_ptr() for arg in args if isinstance(arg, Tensor)]
        self._last = bound
        if bound.is_hooked():
            return run(self._prepare(*args, **kwargs))
        return bound.launch(pointers)

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
            bound = _Bound(launch, compiled, list(_tensors(apart)), _guard(args, kwargs))
            self._bound[signature] = bound
        return launch.out


def _guard(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Guard:
    """Return what recognises calls of this one's signature; it may say no when in doubt."""
    places = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]
    take_tensors = _getter(places)
    take_others = _getter([i for i in range(len(args)) if i not in places])
    tensors, others = take_tensors(args), take_others(args)
    if math.gcd(16, *map(Tensor.data_ptr, tensors)) < 16:
        return lambda args, kwargs: None  # no call that is not aligned is recognised
    count, types = len(args), [*map(type, (*others, *kwargs.values()))]
    guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    alike: Callable[..., bool] = guards.check  # compares type and requires_grad, too
    require_grad = any(tensor.requires_grad for tensor in tensors)

    def guard(these: tuple[Any, ...], options: dict[str, Any]) -> list[int] | None:
        if len(these) != count or options != kwargs:
            return None
        if types:  # compared first: 1 == True, and `None != tensor` raises
            values = take_others(these)
            if [*map(type, (*values, *options.values()))] != types or values != others:
                return None
            these = take_tensors(these)
        if not alike(*these) or (require_grad and torch.is_grad_enabled()):
            return None
        pointers = [tensor.data_ptr() for tensor in these]
        return pointers if math.gcd(16, *pointers) == 16 else None

    return guard


def _getter(places: list[int]) -> Callable[[tuple[Any, ...]], Any]:
    """Return what takes the arguments at `places` out of all."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda args: [args[i] for i in places]


class _Slot(int):
    """Stands for a pointer, by its place among those of a call."""


class _Bound:
    """Compiled kernels with all their arguments but the stream and the pointers."""

    def __init__(
        self, launch: Launch, compiled: list[Any], given: list[Tensor], guard: _Guard
    ) -> None:
        from triton import knobs

        self.guard = guard
        self.next = self  # the launch that followed it last time
        self._kernel, self._runtime = launch.kernel, knobs.runtime
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
            _bind(one, kernel, slots) for one, kernel in zip(_chain(launch), compiled, strict=True)
        ]

    def is_hooked(self) -> bool:
        """Return whether somebody, a profiler say, wants to see the launches."""
        runtime = self._runtime
        try:
            return bool(
                runtime.launch_enter_hook.calls
                or runtime.launch_exit_hook.calls
                or self._kernel.pre_run_hooks
            )
        except AttributeError:  # a function, or None, was put in the place of a chain of hooks
            return True

    def launch(self, pointers: list[int]) -> Tensor | tuple[Tensor, ...] | None:
        """Launch with the pointers of the given tensors and return the output or outputs."""
        if torch._C._cuda_getDevice() != self._device:
            with torch.cuda.device(self._device):
                return self.launch(pointers)
        fresh = [empty() for empty in self._fresh]
        if fresh:
            pointers += map(Tensor.data_ptr, fresh)
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        for start, grid, function, template, rest in self._kernels:
            filled = _fill(template, pointers) if template else pointers
            start(*grid, stream, *function, *filled, *rest)
        if self._returns_tuple:
            return tuple(fresh[: self._returned])
        return fresh[0] if self._returned else None


def _bind(launch: Launch, compiled: Any, slots: dict[int, _Slot]) -> tuple[Any, ...]:
    """Return what starts a kernel, its grid, and its arguments before, with and after pointers."""
    grid = (*launch.grid, 1, 1)[:3]
    start, function = _entry(compiled)
    template = _template(launch.tensors, slots)
    first, others = template[: len(slots)], template[len(slots) :]
    if {*map(type, first)} == {_Slot} and first == tuple(range(len(slots))):
        # No template: the pointers are those of the call, all of them and in order.
        return start, grid, function, (), (*others, *launch.scalars, *launch.constexprs)
    return start, grid, function, template, (*launch.scalars, *launch.constexprs)


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
    import triton

    run, hooks = compiled.run, (None, None, None)  # a hooked launch goes through Triton
    if triton.__version__.startswith("3.6.") and not (
        run.global_scratch_size or run.profile_scratch_size
    ):
        # `run` is Python that allocates scratch, if any, and calls this.
        modes = (run.launch_cooperative_grid, run.launch_pdl, None, None)
        return run.launch, (compiled.function, *modes, compiled.packed_metadata, *hooks)
    return run, (compiled.function, compiled.packed_metadata, *hooks)


def _signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    grad = torch.is_grad_enabled()
    described = [
        (a.dtype, a.shape, a.stride(), a.get_device(), a.data_ptr() % 16, grad and a.requires_grad)
        if isinstance(a, Tensor)
        else (type(a), a)
        for a in args
    ]
    return (*described, *((name, type(a), a) for name, a in kwargs.items()))


@functools.cache
def _knows_triton() -> bool:
    """Return whether compiled kernels may be launched directly; warn once where not."""
    import triton

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
