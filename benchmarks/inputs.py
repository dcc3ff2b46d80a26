"""Random inputs of the benchmarks: paged caches and slots in permuted pages."""

from __future__ import annotations

import argparse

import torch
from harness import HKV, D, P
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
LAYOUTS = ("NHD", "HND")


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what caches are like."""
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["NHD"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])


def make_slots(tokens: int, sets: int) -> tuple[int, list[Tensor]]:
    """Return a number of blocks, and for each set the slots of `tokens` in pages of its own."""
    pages = -(-tokens // P)
    num_blocks = max(sets * pages, 4096)
    order = torch.randperm(num_blocks, device="cuda")[: sets * pages]
    slots = order.view(sets, pages, 1) * P + torch.arange(P, device="cuda")
    return num_blocks, list(slots.flatten(1)[:, :tokens].contiguous())


def make_caches(layout: str, dtype: torch.dtype, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Return random caches [N, P, Hkv, D] of keys and values."""
    return make_cache(layout, dtype, num_blocks), make_cache(layout, dtype, num_blocks)


def make_cache(layout: str, dtype: torch.dtype, num_blocks: int) -> Tensor:
    """Return a random cache [N, P, Hkv, D]."""
    if layout == "HND":
        return randn(num_blocks, HKV, P, D).to(dtype).transpose(1, 2)
    return randn(num_blocks, P, HKV, D).to(dtype)


def randn(*shape: int) -> Tensor:
    """Return random bfloat16 numbers on the GPU."""
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def to_cache(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x` as the eager code of a model rounds it to the dtype of a cache, saturating."""
    if dtype.itemsize == 1:
        limit = torch.finfo(dtype).max
        return x.clamp(-limit, limit).to(dtype).view(torch.uint8)
    return x.to(dtype)


def bits(cache: Tensor) -> Tensor:
    """Return `cache`, a float8 one by its bits, which PyTorch can index and fill everywhere."""
    return cache.view(torch.uint8) if cache.dtype.itemsize == 1 else cache


def zeros_like(caches: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return caches of the layout and dtype of `caches` that hold zeros."""
    key_cache, value_cache = (torch.empty_like(cache) for cache in caches)
    bits(key_cache).zero_()
    bits(value_cache).zero_()
    return key_cache, value_cache
