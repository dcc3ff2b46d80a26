"""Copy blocks of a paged cache: cache[l, destination] = cache[l, source].

L layers, N blocks of P slots, Hkv KV heads, head sizes D (key) and Dv (value). One program moves a
tile of one block's rows, of keys or of values, in one layer.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from torch_tkv.kernels.launcher import DEBUG, Launch


@triton.jit
def _copy_tile(
    cache,  # [N, P, Hkv, D], at its layer
    source,
    destination,
    stride_n,
    stride_p,
    stride_h,
    P: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    dim = tl.arange(0, BLOCK_D)[None, :]
    inside = (row < P * HEADS) & (dim < HEAD_SIZE)
    place = cache + row // HEADS * stride_p + row % HEADS * stride_h + dim  # [BLOCK_R, BLOCK_D]
    x = tl.load(place + source * stride_n, mask=inside, other=0.0)
    tl.store(place + destination * stride_n, x, mask=inside)


@triton.jit(do_not_specialize=["num_blocks"])
def _copy_blocks(
    key_cache,  # [L, N, P, Hkv, D]
    value_cache,  # [L, N, P, Hkv, Dv]
    block_pairs,  # [n, 2]
    key_cache_stride_l,
    key_cache_stride_n,
    key_cache_stride_p,
    key_cache_stride_h,
    value_cache_stride_l,
    value_cache_stride_n,
    value_cache_stride_p,
    value_cache_stride_h,
    pairs_stride_n,
    pairs_stride_2,
    num_blocks,
    P: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    pair = block_pairs + tl.program_id(0).to(tl.int64) * pairs_stride_n
    source = tl.load(pair).to(tl.int64)
    destination = tl.load(pair + pairs_stride_2).to(tl.int64)
    exist = (source < num_blocks) & (destination < num_blocks)
    tl.device_assert(exist, "copy_blocks: a block lies outside the cache")
    if exist & (source >= 0) & (destination >= 0) & (source != destination):
        layer = (tl.program_id(2) // 2).to(tl.int64)
        if tl.program_id(2) % 2 == 0:
            _copy_tile(
                key_cache + layer * key_cache_stride_l, source, destination,
                key_cache_stride_n, key_cache_stride_p, key_cache_stride_h,
                P, HKV, D, BLOCK_R, BLOCK_D,
            )  # fmt: skip
        else:
            _copy_tile(
                value_cache + layer * value_cache_stride_l, source, destination,
                value_cache_stride_n, value_cache_stride_p, value_cache_stride_h,
                P, HKV, DV, BLOCK_R, BLOCK_DV,
            )  # fmt: skip


class Plan(NamedTuple):
    """How to launch: the grid and the tile of a block's rows."""

    grid: tuple[int, int, int]
    BLOCK_R: int
    BLOCK_D: int
    BLOCK_DV: int
    num_warps: int


def plan(pairs: int, layers: int, rows: int, head_size: int, value_size: int) -> Plan:
    """Plan the copy of `pairs` blocks of `rows` = P * Hkv heads in each of `layers` layers."""
    block_d, block_dv = (triton.next_power_of_2(size) for size in (head_size, value_size))
    width = max(block_d, block_dv)
    block_r = min(max(4096 // width, 1), triton.next_power_of_2(rows))
    num_warps = min(max(block_r * width // (32 * 32), 1), 8)
    grid = (pairs, triton.cdiv(rows, block_r), 2 * layers)
    return Plan(grid, block_r, block_d, block_dv, num_warps)


def prepare(key_cache: Tensor, value_cache: Tensor, block_pairs: Tensor) -> Launch:
    """Describe the launch of a copy; arguments as in `torch_tkv.copy_blocks`."""
    *layers, num_blocks, block_size, heads, head_size = key_cache.shape
    value_size = value_cache.shape[-1]
    num_layers = layers[0] if layers else 1
    grid, *blocks, num_warps = plan(
        block_pairs.shape[0], num_layers, block_size * heads, head_size, value_size
    )
    return Launch(
        _copy_blocks,
        grid,
        (key_cache, value_cache, block_pairs),
        (
            *_strides(key_cache),
            *_strides(value_cache),
            *block_pairs.stride(),
            num_blocks,
        ),
        (block_size, heads, head_size, value_size, *blocks),
        {"num_warps": num_warps, "debug": DEBUG},
    )


def _strides(cache: Tensor) -> tuple[int, ...]:
    """Return the strides of layers, blocks, slots and heads; that of an only layer is 0."""
    return (*((0,) if cache.dim() == 4 else ()), *cache.stride()[:-1])
