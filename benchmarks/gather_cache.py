"""tkv::gather_cache against Inductor's code for eager indexing and plain copies.

`python benchmarks/gather_cache.py --csv gather.csv --plot gather.png`
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence

import harness
import torch
from harness import DEVICE, HKV, Case, D, P
from inputs import DTYPES, add_cache_options, copy_calls, make_caches, make_slots
from torch import Tensor

import torch_tkv
from torch_tkv import reference

MAX_SEQUENCES = 32


def count_bytes(tokens: int, cache_dtype: torch.dtype, dtype: torch.dtype) -> int:
    """Return what a gather of keys and values reads and writes, tables apart."""
    return 2 * tokens * HKV * D * (cache_dtype.itemsize + dtype.itemsize)


def make_cases(tokens: int, sets: int, options: argparse.Namespace) -> Iterator[Case]:
    """Yield a case for each layout and dtype of the cache."""
    for layout in options.layouts:
        for name in options.dtypes:
            yield make_case(tokens, sets, layout, name)


def make_case(tokens: int, sets: int, layout: str, name: str) -> Case:
    """Return all ways to gather `tokens` keys and values from a cache of one layout and dtype."""
    dtype = DTYPES[name]
    num_blocks, slots = make_slots(tokens, sets)
    caches = make_caches(layout, dtype, num_blocks)
    # Sequences that start in whole pages, so that any division of the pages is a batch.
    pages = [(s[::P] // P).int() for s in slots]
    cuts = cut(len(pages[0]))
    lengths = torch.tensor(cuts).diff() * P
    starts = torch.cat((torch.zeros(1), lengths.cumsum(0).clamp(max=tokens))).int().to(DEVICE)
    tables = [make_table(order, cuts) for order in pages]
    k_scale, v_scale = torch.rand(2, device=DEVICE) + 0.5 if dtype.itemsize == 1 else (None, None)
    rows = [[torch.empty(tokens, HKV, D, dtype=dtype, device=DEVICE) for _ in caches]] * sets

    def tkv(i: int) -> Sequence[Tensor]:
        return torch_tkv.gather_cache(*caches, tables[i], starts, tokens, k_scale, v_scale)

    @torch.compile(fullgraph=True, dynamic=False)
    def index(
        key_cache: Tensor,
        value_cache: Tensor,
        slots: Tensor,
        k_scale: Tensor | None,
        v_scale: Tensor | None,
    ) -> list[Tensor]:
        found = []
        for cache, scale in ((key_cache, k_scale), (value_cache, v_scale)):
            rows = cache[slots // P, slots % P]
            found.append((rows if scale is None else rows.float() * scale).bfloat16())
        return found

    def inductor(i: int) -> Sequence[Tensor]:
        return index(*caches, slots[i], k_scale, v_scale)

    expected = reference.gather_cache(
        *caches, tables[0], starts, tokens, k_scale, v_scale, dtype=torch.bfloat16
    )
    size = count_bytes(tokens, dtype, torch.bfloat16)
    calls = {"tkv": tkv, "inductor cache[b, o]": inductor}
    label, copies = f"{layout} {name}", copy_calls(rows, torch.bfloat16)
    return Case(label, tokens, size, lambda: None, expected, calls, copies)


def cut(pages: int) -> list[int]:
    """Return where to cut a number of pages into sequences, both ends included."""
    count = min(MAX_SEQUENCES, pages)
    inner = torch.randperm(pages - 1)[: count - 1] + 1
    return [0, *sorted(inner.tolist()), pages]


def make_table(order: Tensor, cuts: Sequence[int]) -> Tensor:
    """Return the block table of the sequences that `order` is cut into."""
    width = max(end - begin for begin, end in itertools.pairwise(cuts))
    table = order.new_full((len(cuts) - 1, width), -1)
    for b, (begin, end) in enumerate(itertools.pairwise(cuts)):
        table[b, : end - begin] = order[begin:end]
    return table


if __name__ == "__main__":
    parser = harness.parser(__doc__)
    add_cache_options(parser)
    harness.run("gather_cache", make_cases, parser.parse_args())
