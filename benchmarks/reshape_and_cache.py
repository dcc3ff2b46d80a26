"""tkv::reshape_and_cache against Inductor's code for eager writes, plain copies, vLLM, FlashInfer.

`python benchmarks/reshape_and_cache.py --csv write.csv --plot write.png`
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import harness
import torch
from harness import DEVICE, HKV, Call, Case, D, P, optional
from inputs import (
    DTYPES,
    add_cache_options,
    bits,
    copy_calls,
    make_caches,
    make_rows,
    make_slots,
    to_cache,
    vllm_calls,
    zero,
    zeros_like,
)
from torch import Tensor

import torch_tkv
from torch_tkv import reference


def count_bytes(tokens: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> int:
    """Return what a write of keys and values reads and writes."""
    return 2 * tokens * HKV * D * (dtype.itemsize + cache_dtype.itemsize)


def make_cases(tokens: int, sets: int, options: argparse.Namespace) -> Iterator[Case]:
    """Yield a case for each layout and dtype of the cache."""
    for layout in options.layouts:
        for name in options.dtypes:
            yield make_case(tokens, sets, layout, name, options.near)


def make_case(tokens: int, sets: int, layout: str, name: str, near: int | None) -> Case:
    """Return all ways to write `tokens` keys and values into a cache of one layout and dtype."""
    dtype = DTYPES[name]
    num_blocks, slots = make_slots(tokens, sets, near)
    caches = make_caches(layout, dtype, num_blocks)
    kv = make_rows(tokens, sets, HKV, HKV)

    def tkv(i: int) -> Sequence[Tensor]:
        torch_tkv.reshape_and_cache(*kv[i], *caches, slots[i])
        return caches

    calls = {"tkv": tkv, **inductor_calls(kv, caches, slots, layout)}
    calls |= vllm_calls("reshape_and_cache_flash", kv, caches, slots, num_scales=2)
    calls |= flashinfer_calls(kv, caches, slots, layout)
    expected = zeros_like(caches)
    reference.reshape_and_cache(*kv[0], *expected, slots[0])
    size = count_bytes(tokens, torch.bfloat16, dtype)
    label, copies = f"{layout} {name}", copy_calls(kv, dtype)
    return Case(label, tokens, size, lambda: zero(caches), expected, calls, copies)


def inductor_calls(
    kv: Sequence[Sequence[Tensor]],
    caches: tuple[Tensor, Tensor],
    slots: Sequence[Tensor],
    layout: str,
) -> dict[str, Call]:
    """Return Inductor's code for the two eager forms of a write."""
    dtype, views = caches[0].dtype, (bits(caches[0]), bits(caches[1]))
    places = [(s // P, s % P) for s in slots]

    @torch.compile(fullgraph=True, dynamic=False)
    def by_block(k: Tensor, v: Tensor, kc: Tensor, vc: Tensor, b: Tensor, o: Tensor) -> None:
        kc[b, o] = to_cache(k, dtype)
        vc[b, o] = to_cache(v, dtype)

    @torch.compile(fullgraph=True, dynamic=False)
    def by_slot(k: Tensor, v: Tensor, kc: Tensor, vc: Tensor, s: Tensor) -> None:
        kc.view(-1, HKV, D)[s] = to_cache(k, dtype)
        vc.view(-1, HKV, D)[s] = to_cache(v, dtype)

    def call_by_block(i: int) -> Sequence[Tensor]:
        by_block(*kv[i], *views, *places[i])
        return caches

    def call_by_slot(i: int) -> Sequence[Tensor]:
        by_slot(*kv[i], *views, slots[i])
        return caches

    calls: dict[str, Call] = {"inductor cache[b, o] = k": call_by_block}
    if layout == "NHD":  # a head-major cache has no view by slots
        calls["inductor view[slots] = k"] = call_by_slot
    return calls


def flashinfer_calls(
    kv: Sequence[Sequence[Tensor]],
    caches: tuple[Tensor, Tensor],
    slots: Sequence[Tensor],
    layout: str,
) -> dict[str, Call]:
    """Return FlashInfer's append of one sequence, if it is installed; 16-bit caches only."""
    flashinfer = optional("flashinfer")
    if flashinfer is None or caches[0].dtype.itemsize == 1:
        return {}
    tokens = len(slots[0])
    paged = tuple(cache.transpose(1, 2) if layout == "HND" else cache for cache in caches)
    pages = [(s[::P] // P).int() for s in slots]
    positions = torch.arange(tokens, dtype=torch.int32, device=DEVICE)
    sequence = torch.zeros_like(positions)
    starts = torch.tensor([0, len(pages[0])], dtype=torch.int32, device=DEVICE)
    last = torch.tensor([(tokens - 1) % P + 1], dtype=torch.int32, device=DEVICE)

    def call(i: int) -> Sequence[Tensor]:
        flashinfer.append_paged_kv_cache(
            *kv[i], sequence, positions, paged, pages[i], starts, last, kv_layout=layout
        )
        return caches

    return {"flashinfer": call}


if __name__ == "__main__":
    parser = harness.parser(__doc__)
    add_cache_options(parser)
    parser.add_argument("--near", type=int, metavar="BLOCKS", help="permute blocks among so many")
    harness.run("reshape_and_cache", make_cases, parser.parse_args())
