"""Inputs of the benchmarks, and ways to use them that several share.

Slots lie in permuted pages, tokens in order within them, as those of prompts do.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

import torch
from harness import DEVICE, HKV, Call, D, P, optional
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
LAYOUTS = ("NHD", "HND")
MIN_BLOCKS = 4096
MAX_POSITIONS = 8192


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what caches are like."""
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["NHD"])
    add_dtype_option(parser)


def add_dtype_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that says of which dtypes caches are."""
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])


def make_slots(tokens: int, sets: int, near: int | None = None) -> tuple[int, list[Tensor]]:
    """Return a number of blocks, and for each set the slots of `tokens` in pages of its own.

    Pages lie anywhere or, if `near` is given, among as many neighbours.
    """
    pages = -(-tokens // P)
    num_blocks = max(sets * pages, MIN_BLOCKS)
    neighbourhood = torch.arange(num_blocks, device=DEVICE) // (near or num_blocks)
    within = torch.rand(num_blocks, device=DEVICE, dtype=torch.float64)
    order = (neighbourhood + within).argsort()[: sets * pages]
    slots = order.view(sets, pages, 1) * P + torch.arange(P, device=DEVICE)
    return num_blocks, list(slots.flatten(1)[:, :tokens].contiguous())


def make_random_slots(tokens: int, sets: int) -> tuple[int, list[Tensor]]:
    """Return the same with each token's slot anywhere, as when many sequences decode."""
    num_blocks = max(-(-sets * tokens // P), MIN_BLOCKS)
    slots = torch.randperm(num_blocks * P, device=DEVICE)[: sets * tokens]
    return num_blocks, list(slots.view(sets, tokens))


def make_rows(tokens: int, sets: int, *heads: int) -> list[tuple[Tensor, ...]]:
    """Return for each set random rows [tokens, H, D], one for each of `heads`."""
    return [tuple(randn(tokens, h, D) for h in heads) for _ in range(sets)]


def make_positions(tokens: int, sets: int) -> list[Tensor]:
    """Return for each set random positions of `tokens`."""
    return list(torch.randint(MAX_POSITIONS, (sets, tokens), device=DEVICE))


def make_tables() -> tuple[Tensor, Tensor]:
    """Return the cosines and sines [MAX_POSITIONS, D / 2] of random angles."""
    angle = torch.rand(MAX_POSITIONS, D // 2, device=DEVICE) * 6.28
    return angle.cos().bfloat16(), angle.sin().bfloat16()


def make_caches(layout: str, dtype: torch.dtype, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Return random caches [N, P, Hkv, D] of keys and values."""
    return make_cache(layout, dtype, num_blocks), make_cache(layout, dtype, num_blocks)


def make_cache(layout: str, dtype: torch.dtype, num_blocks: int) -> Tensor:
    """Return a random cache [N, P, Hkv, D]."""
    if layout == "HND":
        return randn(num_blocks, HKV, P, D).to(dtype).transpose(1, 2)
    return randn(num_blocks, P, HKV, D).to(dtype)


def randn(*shape: int) -> Tensor:
    """Return random bfloat16 numbers."""
    return torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)


def bits(cache: Tensor) -> Tensor:
    """Return `cache`, one of 8 bits as uint8, which PyTorch can index and fill everywhere."""
    return cache.view(torch.uint8) if cache.dtype.itemsize == 1 else cache


def zero(caches: Iterable[Tensor]) -> None:
    """Fill caches with zeros."""
    for cache in caches:
        bits(cache).zero_()


def zeros_like(caches: Iterable[Tensor]) -> list[Tensor]:
    """Return caches of the layouts and dtypes of `caches` that hold zeros."""
    empty = [torch.empty_like(cache) for cache in caches]
    zero(empty)
    return empty


def to_cache(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x` as the eager code of a model rounds it to the dtype of a cache, saturating."""
    if dtype.itemsize == 1:
        limit = torch.finfo(dtype).max
        return x.clamp(-limit, limit).to(dtype).view(torch.uint8)
    return x.to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return `x` rotated as a Hugging Face model does it, with tables as wide as a head."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def copy_calls(sources: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> dict[str, Call]:
    """Return plain copies of the tensors of each set to others of `dtype`."""
    targets = [torch.empty_like(source, dtype=dtype) for source in sources[0]]

    def copy(i: int) -> Sequence[Tensor]:
        for target, source in zip(targets, sources[i], strict=True):
            target.copy_(source)
        return targets

    return {"torch copies": copy}


def vllm_calls(
    name: str,
    rows: Sequence[Sequence[Tensor]],
    caches: Sequence[Tensor],
    slots: Sequence[Tensor],
    num_scales: int,
) -> dict[str, Call]:
    """Return the write that vLLM names so, if one is installed that has it."""
    write = getattr(optional("vllm._custom_ops"), name, None)
    if write is None:
        return {}
    kind = "fp8" if caches[0].dtype.itemsize == 1 else "auto"
    scales = [torch.ones(1, device=DEVICE)] * num_scales

    def call(i: int) -> Sequence[Tensor]:
        write(*rows[i], *map(bits, caches), slots[i], kind, *scales)
        return caches

    return {"vllm": call}
