"""tkv::rope_reshape_and_cache and its QK-norm form against Inductor's code for the eager form.

`python benchmarks/rope_reshape_and_cache.py --csv rope.csv --plot rope.png`
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import harness
import torch
from harness import HKV, HQ, Case, D, P
from inputs import (
    DTYPES,
    add_cache_options,
    bits,
    make_caches,
    make_positions,
    make_rows,
    make_slots,
    make_tables,
    randn,
    rotate,
    to_cache,
    zero,
    zeros_like,
)
from torch import Tensor

import torch_tkv
from torch_tkv import reference

EPS = 1e-6
FORMS = ("rope", "qk_norm")


def count_bytes(tokens: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> int:
    """Return what the operator reads and writes, tables of cosines and weights apart."""
    write = 2 * tokens * HKV * D * (dtype.itemsize + cache_dtype.itemsize)
    return write + 2 * tokens * HQ * D * dtype.itemsize


def make_cases(tokens: int, sets: int, options: argparse.Namespace) -> Iterator[Case]:
    """Yield a case for each form, layout and dtype of the cache."""
    for form in options.forms:
        for layout in options.layouts:
            for name in options.dtypes:
                yield make_case(tokens, sets, form, layout, name)


def make_case(tokens: int, sets: int, form: str, layout: str, name: str) -> Case:
    """Return both ways to rotate and write `tokens` tokens."""
    dtype = DTYPES[name]
    num_blocks, slots = make_slots(tokens, sets)
    caches = make_caches(layout, dtype, num_blocks)
    qkv = make_rows(tokens, sets, HQ, HKV, HKV)
    positions = make_positions(tokens, sets)
    cos, sin = make_tables()
    tail: tuple[Any, ...] = (randn(D), randn(D), EPS) if form == "qk_norm" else ()
    operator = f"{form}_rope_reshape_and_cache".removeprefix("rope_")

    def tkv(i: int) -> Sequence[Tensor]:
        args = (*qkv[i], cos, sin, positions[i], *caches, slots[i], *tail)
        return [getattr(torch_tkv, operator)(*args), *caches]

    compiled = torch.compile(eager, fullgraph=True, dynamic=False)
    places = [(s // P, s % P) for s in slots]
    wide = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)

    def inductor(i: int) -> Sequence[Tensor]:
        views = bits(caches[0]), bits(caches[1])
        return [compiled(*qkv[i], *wide, positions[i], *views, *places[i], dtype, *tail), *caches]

    expected = zeros_like(caches)
    args = (*qkv[0], cos, sin, positions[0], *expected, slots[0], *tail)
    query = getattr(reference, operator)(*args)
    size = count_bytes(tokens, torch.bfloat16, dtype)
    calls = {"tkv": tkv, "inductor": inductor}
    # Eager models round where the operator does not, and float8 has 3 bits of mantissa.
    outs = [query, *expected]
    label = f"{form} {layout} {name}"
    return Case(label, tokens, size, lambda: zero(caches), outs, calls, {}, tolerance=0.15)


def eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    blocks: Tensor,
    offsets: Tensor,
    dtype: torch.dtype,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Rotate and write as a Hugging Face model does, with tables as wide as a head."""
    cos, sin = cos[positions][:, None], sin[positions][:, None]
    if q_weight is not None and k_weight is not None:
        query, key = rms_norm(query, q_weight, eps), rms_norm(key, k_weight, eps)
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    key_cache[blocks, offsets] = to_cache(key, dtype)
    value_cache[blocks, offsets] = to_cache(value, dtype)
    return query


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the heads of `x` over their root mean square, times `weight`."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


if __name__ == "__main__":
    parser = harness.parser(__doc__)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    add_cache_options(parser)
    harness.run("rope_reshape_and_cache", make_cases, parser.parse_args())
