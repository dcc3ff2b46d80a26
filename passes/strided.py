"""Find the select, slice, permute and reshape steps that lead to a strided part of a tensor."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_tkv.passes.views import Step, View, same, same_by_guard, value

aten = torch.ops.aten

# Note [Views by their strides]
# A hand-written call reaches the passes with its mutated arguments as sizes, strides and a storage
# offset in a base. Making them again by as_strided is what Inductor gets wrong, so they are led
# back to ordinary views: the offset, written in the strides of the base as digits, says which row
# of each dimension is selected or where its slice starts. What is found is right because it is
# checked: replayed on the base, it has to give the sizes, strides and offset. So the search may
# use the sizes seen at compile time for symbolic ones; where the check needs it, guards are added.


def strided_view(
    view: View, size: Sequence[Any], stride: Sequence[Any], offset: Any
) -> View | None:
    """Return the part of `view` with these sizes, strides and storage offset, None if not found."""
    for start in itertools.chain([view], _refined(view, size, stride)):
        found = _part(start, size, stride, offset)
        if found is not None and _lies_at(found, size, stride, offset):
            return found
    return None


def _hint(size: Any) -> int:
    """Return the value of a size seen at compile time."""
    return int(size) if isinstance(size, int) else int(size.node.hint)


def replayed(view: View) -> Tensor:
    """Return a view of an input at compile time."""
    base = value(view.base)
    with base.fake_mode:
        return view.replay(base)


def _lies_at(view: View, size: Sequence[Any], stride: Sequence[Any], offset: Any) -> bool:
    tensor = replayed(view)
    if tensor.untyped_storage()._cdata != value(view.base).untyped_storage()._cdata:
        return False
    strides = zip(tensor.stride(), stride, size, strict=False)
    long = [(mine, other) for mine, other, n in strides if not same(n, 1)]
    mine = [*tensor.shape, *(pair[0] for pair in long), tensor.storage_offset()]
    return same_by_guard(mine, [*size, *(pair[1] for pair in long), offset])


def _refined(view: View, size: Sequence[Any], stride: Sequence[Any]) -> Iterator[View]:
    """Yield a contiguous view with its dimensions split where the strides of the part need it."""
    tensor = replayed(view)
    if not tensor.is_contiguous():
        return
    left, shape = math.prod(map(_hint, tensor.shape)), []
    strides = {_hint(t) for n, t in zip(size, stride, strict=True) if _hint(n) != 1}
    for unit in sorted(strides | {1}, reverse=True):
        if unit <= 0 or left % unit:
            return
        shape.append(left // unit)
        left = unit
    yield view.then(Step("reshape", aten.reshape.default, ([-1, *shape[1:]],), shape))


def _part(view: View, size: Sequence[Any], stride: Sequence[Any], offset: Any) -> View | None:
    """Select and slice where `offset` says, then bring the dimensions into order."""
    tensor = replayed(view)
    dims = [*zip(map(_hint, tensor.shape), map(_hint, tensor.stride()), strict=True)]
    wanted = [(j, _hint(n), _hint(t)) for j, (n, t) in enumerate(zip(size, stride, strict=True))]
    long = [(j, n, t) for j, n, t in wanted if n != 1]
    rest = _hint(offset) - _hint(tensor.storage_offset())
    starts = [0] * len(dims)
    for dim in sorted(range(len(dims)), key=lambda dim: -dims[dim][1]):
        n, unit = dims[dim]
        if n != 1 and unit > 0:
            starts[dim], rest = divmod(rest, unit)
        if not 0 <= starts[dim] < n:
            return None
    for dim, (n, unit) in reversed([*enumerate(dims)]):
        length = math.prod(size[j] for j, _, t in long if unit <= t < unit * n)
        merged = any(t < unit < t * count for _, count, t in long)
        stop = starts[dim] + _hint(length)
        if n == 1 or (same(length, 1) and not merged):
            view = view.select(dim, starts[dim])
        elif not merged and (starts[dim], stop) != (0, n):
            bounds = starts[dim], stop if stop < n else sys.maxsize
            shape = [*view.shape[:dim], length, *view.shape[dim + 1 :]]
            view = view.then(Step("slice", aten.slice.Tensor, (dim, *bounds, 1), shape))
    return _in_order(view, size, long)


def _in_order(view: View, size: Sequence[Any], long: list[tuple[int, int, int]]) -> View | None:
    """Order the dimensions by their strides, regroup them, and order them as the part has them."""
    strides = list(map(_hint, replayed(view).stride()))
    view = view.permute(sorted(range(len(strides)), key=lambda dim: -strides[dim]))
    kept = [j for j, _, unit in sorted(long, key=lambda x: -x[2])]
    shape = [size[j] for j in kept]
    if not same_by_guard(view.shape, shape):
        symbolic = [n for n in shape if not isinstance(n, int)]
        if len(symbolic) > 1:
            return None
        target = [n if isinstance(n, int) else -1 for n in shape]
        view = view.then(Step("reshape", aten.reshape.default, (target,), shape))
    view = view.permute([kept.index(j) for j in sorted(kept)])
    for j in range(len(size)):
        if j not in kept:
            view = view.unsqueeze(j)
    return view
