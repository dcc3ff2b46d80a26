"""tkv::reshape_and_cache_head_major against Inductor's code for the eager write, copies and vLLM.

`python benchmarks/reshape_and_cache_head_major.py --csv write.csv --plot write.png`
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
    make_random_slots,
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

# Tokens of prompts fill neighbouring slots, which are written together; those of decoding do not.
SLOTS = {"pages": make_slots, "random": make_random_slots}


def make_cases(tokens: int, sets: int, options: argparse.Namespace) -> Iterator[Case]:
    """Yield a case for each order of slots and dtype of the cache."""
    for order in options.slots:
        for name in options.dtypes:
            yield make_case(tokens, sets, order, name)


def make_case(tokens: int, sets: int, order: str, name: str) -> Case:
    """Return all ways to write `tokens` keys and values into a cache of one dtype."""
    dtype = DTYPES[name]
    x = 16 // dtype.itemsize
    num_blocks, slots = SLOTS[order](tokens, sets)
    key_cache = randn(num_blocks, HKV, D // x, P, x).to(dtype)
    caches = key_cache, randn(num_blocks, HKV, D, P).to(dtype)
    kv = make_rows(tokens, sets, HKV, HKV)
    places = [(s // P, s % P) for s in slots]

    def tkv(i: int) -> Sequence[Tensor]:
        torch_tkv.reshape_and_cache_head_major(*kv[i], *caches, slots[i])
        return caches

    @torch.compile(fullgraph=True, dynamic=False)
    def write(k: Tensor, v: Tensor, kc: Tensor, vc: Tensor, b: Tensor, o: Tensor) -> None:
        kc[b, :, :, o] = to_cache(k, dtype).unflatten(2, (-1, x))
        vc[b, :, :, o] = to_cache(v, dtype)

    def inductor(i: int) -> Sequence[Tensor]:
        write(*kv[i], *map(bits, caches), *places[i])
        return caches

    calls = {"tkv": tkv, "inductor cache[b, :, :, o] = k": inductor}
    calls |= vllm_calls("reshape_and_cache", kv, caches, slots, num_scales=2)
    expected = zeros_like(caches)
    reference.reshape_and_cache_head_major(*kv[0], *expected, slots[0])
    size = count_bytes(tokens, torch.bfloat16, dtype)
    copies = copy_calls(kv, dtype)
    return Case(f"{order} {name}", tokens, size, lambda: zero(caches), expected, calls, copies)


if __name__ == "__main__":
    parser = harness.parser(__doc__)
    parser.add_argument("--slots", nargs="+", choices=SLOTS, default=list(SLOTS))
    add_dtype_option(parser)
    harness.run("reshape_and_cache_head_major", make_cases, parser.parse_args())
