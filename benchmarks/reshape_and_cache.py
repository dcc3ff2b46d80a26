"""tkv::reshape_and_cache against Inductor's code for eager writes, plain copies, vLLM, FlashInfer.

`python benchmarks/reshape_and_cache.py --csv write.csv --plot write.png`
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import harness
import torch
from harness import HKV, Call, Case, D, P, optional
from inputs import (
    DTYPES,
    add_cache_options,
    bits,
    make_caches,
    make_slots,
    randn,
    to_cache,
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
            yield make_case(tokens, sets, layout, name)


def make_case(tokens: int, sets: int, layout: str, name: str) -> Case:
    """Return all ways to write `tokens` keys and values into a cache of one layout and dtype."""
    dtype = DTYPES[name]
    num_blocks, slots = make_slots(tokens, sets)
    caches = make_caches(layout, dtype, num_blocks)
    kv = [(randn(tokens, HKV, D), randn(tokens, HKV, D)) for _ in range(sets)]
    targets = [torch.empty_like(kv[0][0], dtype=dtype) for _ in range(2)]

    def reset() -> None:
        for cache in caches:
            bits(cache).zero_()

    def tkv(i: int) -> Sequence[Tensor]:
        torch_tkv.reshape_and_cache(*kv[i], *caches, slots[i])
        return caches

    def copy(i: int) -> Sequence[Tensor]:
        for target, rows in zip(targets, kv[i], strict=True):
            target.copy_(rows)
        return targets

    calls = {"tkv": tkv, **inductor_calls(kv, caches, slots, layout)}
    calls |= vllm_calls(kv, caches, slots) | flashinfer_calls(kv, caches, slots, layout)
    expected = zeros_like(caches)
    reference.reshape_and_cache(*kv[0], *expected, slots[0])
    size = count_bytes(tokens, torch.bfloat16, dtype)
    return Case(f"{layout} {name}", tokens, size, reset, expected, calls, {"torch copies": copy})


def inductor_calls(
    kv: Sequence[tuple[Tensor, Tensor]],
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


def vllm_calls(
    kv: Sequence[tuple[Tensor, Tensor]], caches: tuple[Tensor, Tensor], slots: Sequence[Tensor]
) -> dict[str, Call]:
    """Return vLLM's own kernel, if vLLM is installed."""
    ops = optional("vllm._custom_ops")
    if ops is None:
        return {}
    kind = "fp8" if caches[0].dtype.itemsize == 1 else "auto"
    scale = torch.ones(1, device="cuda")

    def call(i: int) -> Sequence[Tensor]:
        ops.reshape_and_cache_flash(*kv[i], *map(bits, caches), slots[i], kind, scale, scale)
        return caches

    return {"vllm": call}


def flashinfer_calls(
    kv: Sequence[tuple[Tensor, Tensor]],
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
    positions = torch.arange(tokens, dtype=torch.int32, device="cuda")
    sequence = torch.zeros_like(positions)
    starts = torch.tensor([0, len(pages[0])], dtype=torch.int32, device="cuda")
    last = torch.tensor([(tokens - 1) % P + 1], dtype=torch.int32, device="cuda")

    def call(i: int) -> Sequence[Tensor]:
        flashinfer.append_paged_kv_cache(
            *kv[i], sequence, positions, paged, pages[i], starts, last, kv_layout=layout
        )
        return caches

    return {"flashinfer": call}


if __name__ == "__main__":
    parser = harness.parser(__doc__)
    add_cache_options(parser)
    harness.run("reshape_and_cache", make_cases, parser.parse_args())
