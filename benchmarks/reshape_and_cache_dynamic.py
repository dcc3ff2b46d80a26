"""tkv::reshape_and_cache_dynamic against Inductor's code for the eager form and plain copies.

`python benchmarks/reshape_and_cache_dynamic.py --csv write.csv --plot write.png`
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import harness
import torch
from harness import DEVICE, HKV, Case, D, P
from inputs import bits, copy_calls, make_caches, make_rows, make_slots, zero, zeros_like
from torch import Tensor

import torch_tkv
from torch_tkv import reference

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def count_bytes(tokens: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> int:
    """Return what a write of keys and values, with a float32 for each row, reads and writes."""
    return 2 * tokens * HKV * (D * (dtype.itemsize + cache_dtype.itemsize) + 4)


def make_cases(tokens: int, sets: int, options: argparse.Namespace) -> Iterator[Case]:
    """Yield a case for each dtype of the cache."""
    for name in options.dtypes:
        yield make_case(tokens, sets, name)


def make_case(tokens: int, sets: int, name: str) -> Case:
    """Return all ways to write `tokens` keys and values as codes of one dtype."""
    dtype = DTYPES[name]
    num_blocks, slots = make_slots(tokens, sets)
    scale_caches = torch.rand(2, num_blocks, P, HKV, device=DEVICE)
    caches = (*make_caches("NHD", dtype, num_blocks), *scale_caches)
    kv = make_rows(tokens, sets, HKV, HKV)
    places = [(s // P, s % P) for s in slots]

    def tkv(i: int) -> Sequence[Tensor]:
        torch_tkv.reshape_and_cache_dynamic(*kv[i], *caches, slots[i])
        return caches

    @torch.compile(fullgraph=True, dynamic=False)
    def write(rows: Sequence[Tensor], caches: Sequence[Tensor], b: Tensor, o: Tensor) -> None:
        for x, cache, scale_cache in zip(rows, caches[:2], caches[2:], strict=True):
            codes, scale_cache[b, o] = quantize(x, dtype)
            cache[b, o] = codes

    def inductor(i: int) -> Sequence[Tensor]:
        write(kv[i], [bits(cache) for cache in caches], *places[i])
        return caches

    expected = zeros_like(caches)
    reference.reshape_and_cache_dynamic(*kv[0], *expected, slots[0])
    size = count_bytes(tokens, torch.bfloat16, dtype)
    calls = {"tkv": tkv, "inductor": inductor}
    copies = copy_calls(kv, dtype)
    case = Case(name, tokens, size, lambda: zero(caches), expected, calls, copies)
    # Where the division is less exact a row may fall on the next code, in float8 an eighth away.
    return case._replace(tolerance=0.13, read=read)


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the codes of rows, as uint8, and their scales, as eager code computes them."""
    limit = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    x = x.float()
    scales = x.abs().amax(-1).clamp(min=1e-12) / limit
    codes = (x / scales[..., None]).clamp(-limit, limit)
    codes = codes.round() if dtype == torch.int8 else codes
    return codes.to(dtype).view(torch.uint8), scales


def read(caches: Sequence[Tensor]) -> list[Tensor]:
    """Return what a reader makes of the caches."""
    pairs = zip(caches[:2], caches[2:], strict=True)
    return [cache.float() * scales[..., None] for cache, scales in pairs]


if __name__ == "__main__":
    parser = harness.parser(__doc__)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    harness.run("reshape_and_cache_dynamic", make_cases, parser.parse_args())
