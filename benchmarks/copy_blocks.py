"""tkv::copy_blocks against Inductor's code for eager indexing and plain copies.

`python benchmarks/copy_blocks.py --csv copy.csv --plot copy.png`
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import harness
import torch
from harness import HKV, Case, D, P
from inputs import copy_calls, make_slots, randn
from torch import Tensor

import torch_tkv
from torch_tkv import reference


def count_bytes(tokens: int, dtype: torch.dtype, layers: int = 1) -> int:
    """Return what a copy of the blocks of `tokens` keys and values reads and writes."""
    return 4 * layers * -(-tokens // P) * P * HKV * D * dtype.itemsize


def make_cases(tokens: int, sets: int, options: argparse.Namespace) -> Iterator[Case]:
    """Yield a case for each number of layers."""
    for layers in options.layers:
        yield make_case(tokens, sets, layers)


def make_case(tokens: int, sets: int, layers: int) -> Case:
    """Return all ways to copy the blocks of `tokens` in some layers."""
    pages = -(-tokens // P)
    num_blocks, slots = make_slots(2 * pages * P, sets)
    pairs = [(s[::P] // P).view(-1, 2) for s in slots]
    written = torch.cat(pairs)[:, 1]
    caches = [randn(layers, num_blocks, P, HKV, D) for _ in range(2)]

    def reset() -> None:
        for cache in caches:
            cache[:, written] = 0

    def tkv(i: int) -> Sequence[Tensor]:
        torch_tkv.copy_blocks(*caches, pairs[i])
        return caches

    @torch.compile(fullgraph=True, dynamic=False)
    def eager(key_cache: Tensor, value_cache: Tensor, pairs: Tensor) -> None:
        source, destination = pairs.unbind(1)
        for cache in (key_cache, value_cache):
            cache[:, destination] = cache[:, source]

    def inductor(i: int) -> Sequence[Tensor]:
        eager(*caches, pairs[i])
        return caches

    reset()
    expected = [cache.clone() for cache in caches]
    reference.copy_blocks(*expected, pairs[0])
    size = count_bytes(tokens, torch.bfloat16, layers)
    calls = {"tkv": tkv, "inductor cache[:, b] = cache[:, a]": inductor}
    blocks = [[randn(layers, pages, P, HKV, D) for _ in caches] for _ in slots]
    copies = copy_calls(blocks, torch.bfloat16)
    return Case(f"{layers} layers", tokens, size, reset, expected, calls, copies)


if __name__ == "__main__":
    parser = harness.parser(__doc__)
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 8])
    harness.run("copy_blocks", make_cases, parser.parse_args())
