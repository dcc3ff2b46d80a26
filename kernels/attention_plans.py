"""How the kernels of attention are launched, from shapes alone."""

from __future__ import annotations

from typing import NamedTuple

import triton

from torch_tkv.kernels.attention_geometry import Plan, complete
from torch_tkv.kernels.device import Device
from torch_tkv.kernels.paged_decode import FEW


class Config(NamedTuple):
    """How a kernel is launched: the plan that is compiled into it, and Triton's options."""

    plan: Plan
    num_warps: int
    num_stages: int


# A sequence of up to so many new tokens is decoded where longer ones are prefilled.
MAX_DECODED = 16


def parts(tokens: int, seqs: int) -> tuple[bool, bool]:
    """Return whether a batch may need the decoding part, and whether the prefilling part.

    Where the tokens are few, decoding does it all: it is right for any number of new tokens.
    """
    prefill = tokens > MAX_DECODED * max(seqs, 1)
    return seqs != 1 or not prefill, prefill


def _most_units(tokens: int, seqs: int, group: int, tile_rows: int) -> int:
    """Return how many tiles of queries the rows of `tokens` queries take, at most."""
    return min(tokens * group // tile_rows + seqs, tokens)


# Note [Narrow products]
# A product takes 16 columns of queries and keys or more, and pairs halve what it is given.
#
# On Hopper a product of 64 queries or more is a wgmma. Two of them in a kernel, with rows of 16 or
# 32 elements, are reported to read outside of shared memory or to give wrong results, and with rows
# of 64 not to (pytorch/helion#1905, triton-lang/triton#11366). Prefilling did what fits that, with
# an illegal access, NaN or other wrong numbers, where keys of 8 bits had 32 columns and values 16
# (H200, Triton 3.6, 2026-11-30). So rows are of 64 elements there.


def _widened(base: Plan, device: Device, *, block_m: int, bits: int) -> Plan:
    """Return `base` with rows that are wide enough; see Note [Narrow products]."""
    wgmma = device.arch == 90 and block_m >= 64 and bits <= 16
    columns = (64 if wgmma else 16) * (1 if base.pairs is None else 2)
    block_dv = max(base.block_dv, columns) if wgmma else base.block_dv
    return base._replace(block_d=max(base.block_d, columns), block_dv=block_dv)


def plan_decode(
    base: Plan, device: Device, *, tokens: int, seqs: int, kv_heads: int, bits: int, max_keys: int
) -> Config:
    """Plan the decoding of `tokens` queries, whose keys take `bits` bits an element.

    `max_keys` is what the block table has room for in a sequence. Tiles of keys of 16 KiB and two
    programs a processor were the best found on one H200 (Triton 3.6, 2026-11-21; 32 sequences of
    4096 keys, 8 heads x 128): bfloat16 133 us, with tiles of half the size 155, with twice as large
    ones 160; float8 77, 90 and 81. More programs than fit at once cost a fifth.

    To begin with another sequence drains the pipeline of loads. With 8 bits, which need more
    instructions, twice as many programs of half the size hide that where sequences are many: 32 x
    8192, 64 x 2048, 128 x 1024 and 256 x 512 keys took 131.8, 75.4, 77.2 and 84.1 us where large
    ones took 134.3, 81.1, 88.3 and 99.8, but 1 x 65536 took 42.5 instead of 41.0, and with 31 x 512
    53.5 instead of 52.6 (2026-11-30).
    """
    _, prefill = parts(tokens, seqs)
    rows = 1 if prefill else triton.cdiv(tokens, max(seqs, 1)) * base.group
    block_m = min(max(triton.next_power_of_2(rows), 16), 64)
    block_m = max(block_m, triton.next_power_of_2(base.group))
    base = _widened(base, device, block_m=block_m, bits=bits)
    workers = max(2 * device.processors // kv_heads, 1)
    small = bits == 8 and block_m == 16 and 2 * seqs > workers
    row_bytes = max(base.block_d, base.block_dv) * bits // 8
    block_n = min(max((8192 if small else 16384) // row_bytes, 16), 128 if block_m <= 64 else 64)
    # Tiles of whole tokens keep partial results small: where they are no more, they are taken.
    whole = block_m - block_m % base.group
    tile_rows = whole if triton.cdiv(rows, whole) == triton.cdiv(rows, block_m) else block_m
    tiles = _most_units(tokens, seqs, base.group, tile_rows) * triton.cdiv(max_keys, block_n)
    plan = base._replace(
        tile_rows=tile_rows,
        block_m=block_m,
        block_n=block_n,
        block_b=triton.next_power_of_2(max(seqs, 1)),
        workers=min((2 if small else 1) * workers, max(tiles // 4, 16)),
        max_queries=MAX_DECODED if prefill else None,
        pdl=device.arch >= 90,
    )
    return Config(complete(plan), 2 if small else 4, 3 if device.arch else 2)


class Merge(NamedTuple):
    """How partial results are merged."""

    by_unit: bool  # programs are as many as tiles of queries, or as workers where these are fewer
    programs: int
    rows: int  # of a tile of queries, to a program
    ahead: int  # partial results that it loads at once, where there are more than a few
    num_warps: int


def plan_merge(plan: Plan, *, tokens: int, seqs: int) -> Merge:
    """Plan the merging of what `plan` decodes.

    A program merges few rows, so that there are many programs, and has few registers, so that they
    have room beside those that decode: then all but the merging is done when they wait for these.
    us on H200s (Triton 3.6, 2026-11-30), each line on one GPU:

    - bfloat16, 1 x 65536 keys: 33 results at once 67.4, 17 68.0, 16 68.5;
    - bfloat16, 1 x 65536 with 31 x 512: 4 results at once 88.5, 9 87.8, 9 by two warps 86.8;
    - bfloat16, 128 x 1024: 4 results by a warp 133.9, 9 by two 133.6, 17 by two 135.7;
    - float8, 8 x 8192: 9 results by a warp 41.7, by two 41.0;
    - float8, 128 x 1024: 9 results by a warp 77.2, by two 81.0;
    - bfloat16, 8 x 8192 of one KV head: a program for each worker 18.9, for each sequence 16.2.
    """
    queries = triton.cdiv(tokens, max(seqs, 1))
    if plan.max_queries is not None:  # the others are prefilled
        queries = 1
    results = max(plan.workers // max(seqs, 1), 1)  # of a sequence, if all are as long
    # Tiles of many rows may be of few (padded rows count as queries): they take four programs.
    rows = min(queries * plan.group, plan.tile_rows)
    rows = max(triton.next_power_of_2(rows) // 4, 1)
    rows = min(rows, max(32 // 2 ** (results.bit_length() - 1), 1))
    units = max(_most_units(tokens, seqs, plan.group, plan.tile_rows), 1)
    if results <= FEW.value and rows == 1:
        # A longer sequence may be among them. Decoding 8 bits leaves fewer registers.
        ahead, num_warps = 9, 2 if plan.pairs is None or units <= 16 else 1
    else:
        ahead = min(max(results, FEW.value), 33 // rows)
        num_warps = 4 if rows * ahead >= 32 else 2 if rows * ahead >= 16 else 1
    by_unit = units <= plan.workers
    return Merge(by_unit, units if by_unit else plan.workers, rows, ahead, num_warps)


def plan_prefill(
    base: Plan, device: Device, *, tokens: int, seqs: int, bits: int, hopper: bool = False
) -> Config:
    """Plan the prefilling of `tokens` queries; the wider of query and cache has `bits` bits."""
    decode, _ = parts(tokens, seqs)
    base = base._replace(pairs=None)
    base = _widened(base, device, block_m=64, bits=bits)
    row_bytes = max(base.block_d, base.block_dv) * bits // 8
    # Tiles must fit the shared memory: 99 KiB on sm_86 and sm_89, 64 KiB on gfx942.
    large = device.arch in (80, 90, 100, 103) and bits == 16
    block_m = 128 if large else 64 if row_bytes <= 256 else 32
    block_n = min(max(16384 // row_bytes, 16), 64)
    if hopper:
        # Registers are enough for three consumers of narrow heads, of 64 rows each.
        block_m = 192 if base.block_d == 64 and not base.converts else 128
        block_n = 128 if base.block_d <= 128 else 64
    plan = base._replace(
        tile_rows=block_m,
        block_m=block_m,
        block_n=block_n,
        block_b=min(triton.next_power_of_2(seqs + 1), 1024),
        max_queries=MAX_DECODED if decode else None,
        pdl=hopper,
    )
    return Config(complete(plan), 8 if large and not hopper else 4, 3 if large else 2)
