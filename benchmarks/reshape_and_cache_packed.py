"""tkv::reshape_and_cache_packed against Inductor's code for the eager write, plain copies and vLLM.

`python benchmarks/reshape_and_cache_packed.py --csv write.csv --plot write.png`
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import harness
import torch
from harness import HKV, Case, D, P
from inputs import (
    DTYPES,
    add_dtype_option,
    bits,
    copy_calls,
    make_rows,
    make_slots,
    randn,
    to_cache,
    vllm_calls,
    zero,
    zeros_like,
)
from reshape_and_cache import count_bytes
from torch import Tensor

import torch_tkv
from torch_tkv import reference
from torch_tkv.reference.reshape_and_cache_packed import unpack

KV_DIMS = (0, 1, -1)


def make_cases(tokens: int, sets: int, options: argparse.Namespace) -> Iterator[Case]:
    """Yield a case for each place of the dimension of keys and values, and dtype of the cache."""
    for kv_dim in options.kv_dims:
        for name in options.dtypes:
            yield make_case(tokens, sets, kv_dim, name)


def make_case(tokens: int, sets: int, kv_dim: int, name: str) -> Case:
    """Return all ways to write `tokens` keys and values into a cache of one layout and dtype."""
    dtype = DTYPES[name]
    num_blocks, slots = make_slots(tokens, sets)
    shape = {0: (2, num_blocks, P, HKV, D), 1: (num_blocks, 2, P, HKV, D)}
    kv_cache = randn(*shape.get(kv_dim, (num_blocks, P, HKV, 2 * D))).to(dtype)
    caches = unpack(kv_cache, kv_dim, D)
    kv = make_rows(tokens, sets, HKV, HKV)
    places = [(s // P, s % P) for s in slots]

    def tkv(i: int) -> Sequence[Tensor]:
        torch_tkv.reshape_and_cache_packed(*kv[i], kv_cache, slots[i], kv_dim=kv_dim)
        return caches

    @torch.compile(fullgraph=True, dynamic=False)
    def write(k: Tensor, v: Tensor, kv_cache: Tensor, b: Tensor, o: Tensor) -> None:
        for rows, cache in zip((k, v), unpack(kv_cache, kv_dim, D), strict=True):
            cache[b, o] = to_cache(rows, dtype)

    def inductor(i: int) -> Sequence[Tensor]:
        write(*kv[i], bits(kv_cache), *places[i])
        return caches

    calls = {"tkv": tkv, "inductor views[b, o] = k": inductor}
    calls |= vllm_calls("reshape_and_cache_flash", kv, caches, slots, num_scales=2)
    (right,) = zeros_like([kv_cache])
    reference.reshape_and_cache_packed(*kv[0], right, slots[0], kv_dim=kv_dim)
    expected = unpack(right, kv_dim, D)
    size = count_bytes(tokens, torch.bfloat16, dtype)
    label = f"kv_dim {kv_dim} {name}"
    copies = copy_calls(kv, dtype)
    return Case(label, tokens, size, lambda: zero([kv_cache]), expected, calls, copies)


if __name__ == "__main__":
    parser = harness.parser(__doc__)
    parser.add_argument("--kv-dims", nargs="+", type=int, choices=KV_DIMS, default=KV_DIMS)
    add_dtype_option(parser)
    harness.run("reshape_and_cache_packed", make_cases, parser.parse_args())
