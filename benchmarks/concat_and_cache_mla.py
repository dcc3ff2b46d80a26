"""tkv::concat_and_cache_mla against Inductor's code for the eager write, plain copies and vLLM.

`python benchmarks/concat_and_cache_mla.py --csv mla.csv --plot mla.png`
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import harness
import torch
from harness import Case, P
from inputs import (
    DTYPES,
    add_dtype_option,
    bits,
    copy_calls,
    make_slots,
    randn,
    to_cache,
    vllm_calls,
    zero,
    zeros_like,
)
from torch import Tensor

import torch_tkv
from torch_tkv import reference

# Latent and rope sizes of DeepSeek's models.
R, PE = 512, 64


def count_bytes(tokens: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> int:
    """Return what a write of the latent and rope parts reads and writes."""
    return tokens * (R + PE) * (dtype.itemsize + cache_dtype.itemsize)


def make_cases(tokens: int, sets: int, options: argparse.Namespace) -> Iterator[Case]:
    """Yield a case for each dtype of the cache."""
    for name in options.dtypes:
        yield make_case(tokens, sets, name)


def make_case(tokens: int, sets: int, name: str) -> Case:
    """Return all ways to write `tokens` rows into a cache of one dtype."""
    dtype = DTYPES[name]
    num_blocks, slots = make_slots(tokens, sets)
    cache = randn(num_blocks, P, R + PE).to(dtype)
    rows = [(randn(tokens, R), randn(tokens, PE)) for _ in slots]
    places = [(s // P, s % P) for s in slots]

    def tkv(i: int) -> Sequence[Tensor]:
        torch_tkv.concat_and_cache_mla(*rows[i], cache, slots[i])
        return [cache]

    @torch.compile(fullgraph=True, dynamic=False)
    def write(kv_c: Tensor, k_pe: Tensor, cache: Tensor, blocks: Tensor, offsets: Tensor) -> None:
        cache[blocks, offsets] = to_cache(torch.cat((kv_c, k_pe), -1), dtype)

    def inductor(i: int) -> Sequence[Tensor]:
        write(*rows[i], bits(cache), *places[i])
        return [cache]

    calls = {"tkv": tkv, "inductor cache[b, o] = cat": inductor}
    calls |= vllm_calls("concat_and_cache_mla", rows, [cache], slots, num_scales=1)
    (expected,) = zeros_like([cache])
    reference.concat_and_cache_mla(*rows[0], expected, slots[0])
    size = count_bytes(tokens, torch.bfloat16, dtype)
    copies = copy_calls(rows, dtype)
    return Case(name, tokens, size, lambda: zero([cache]), [expected], calls, copies)


if __name__ == "__main__":
    parser = harness.parser(__doc__)
    add_dtype_option(parser)
    harness.run("concat_and_cache_mla", make_cases, parser.parse_args())
