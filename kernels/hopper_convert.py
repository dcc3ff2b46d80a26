"""Caches of 8 bits, prefilling on Hopper: fetched as they are, and converted in shared memory.

What the tensor cores multiply with them has 16 bits.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from torch_tkv.kernels.hopper_ring import STAGES, barrier, block_numbers, fetch
from torch_tkv.kernels.tile_list import known, load_entry, num_turns, tile_of

# Note [Converted caches]
# Codes, elements of 8 bits, are fetched into stages of their own, keys and values in turn: the keys
# of a tile, then the values of the one before, which is the order in which the consumers need them.
# Two warps make float16 of them, which is exact, and fill the ring. Prefilling 1 x 8192 tokens of
# 32 and 8 heads of 128 takes 979 us with float8_e4m3fn, 860 with bfloat16; the kernel for other
# GPUs, whose products convert what they multiply, 1915 (H200, Triton 3.6, 2026-12-01).
#
# Scales of each token are multiplied with scores and weights. The producer stores those of a tile
# before the tile counts as full. Nobody reads any more what it overwrites: to fetch tile s is to
# know that tile s - 1 was converted, so that the consumers have left tile s - 3, which they do when
# they have read the scales of tile s - 4.

CONVERTERS = gl.constexpr(2)  # warps
SCALES = gl.constexpr(4)  # tiles of keys whose scales there is room for


@gluon.jit
def allocate_scales(plan: gl.constexpr):
    """Return shared memory for scales of keys or of values."""
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return gl.allocate_shared_memory(gl.float32, [SCALES, plan.block_n], LAYOUT)


@gluon.jit
def produce_codes(boxes, caches, codes, ring, work, COUNT: gl.constexpr, plan: gl.constexpr):
    """Fetch keys and values as `produce` does, in the order of Note [Converted caches]."""
    step = 0
    ahead = load_entry(0, work)
    turns = num_turns(work)
    before, tile_before, head_before = (), 0, 0
    for _ in gl.static_range(plan.block_n // min(plan.page, plan.block_n)):
        before = before + (work.num_blocks,)  # type: ignore[assignment]  # noqa: RUF005
    for turn in range(turns + 1):
        queries = tile_of(known(ahead, work, plan), work, plan)
        ahead = load_entry(turn + 1, work)
        walk = queries.walk
        for n in range(gl.where(turn < turns, walk.hi - walk.lo, 1)):
            tile = walk.hi - 1 - n
            numbers = block_numbers(queries.blocks, tile, plan)
            if ring.k_scales is not None:
                keys = _keys_of(queries.blocks, tile, plan)
                k_scales = _load_scales(caches[0], keys, queries.kv_head)
                v_scales = _load_scales(caches[1], keys, queries.kv_head)
            fetch(boxes[0], numbers, tile, queries.kv_head, codes, 2 * step, COUNT, plan)
            if ring.k_scales is not None:
                ring.k_scales.index(step % SCALES).store(k_scales)
                ring.v_scales.index(step % SCALES).store(v_scales)
                barrier()
                mbarrier.arrive(codes.full.index(2 * step % COUNT), count=1)
            fetch(boxes[1], before, tile_before, head_before, codes, 2 * step + 1, COUNT, plan)
            if ring.k_scales is not None:  # came with the keys
                mbarrier.arrive(codes.full.index((2 * step + 1) % COUNT), count=1)
            before, tile_before, head_before = numbers, tile, queries.kv_head
            step += 1


@gluon.jit
def _keys_of(blocks, tile, plan: gl.constexpr):
    """Return block number and slot of each key of a tile; number -1 for what is not read."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([plan.block_n // 32], [32], [1], [0])
    position = tile * plan.block_n + gl.arange(0, plan.block_n, layout=LAYOUT)
    read = (position < blocks.end) & (position >= blocks.begin)
    entry = blocks.row + (position // plan.page).to(gl.int64) * blocks.stride
    number = gl.load(entry, mask=read, other=-1)
    exists = (number >= 0) & (number < blocks.num_blocks)
    return gl.where(exists, number, -1).to(gl.int32), position % plan.page


@gluon.jit
def _load_scales(cache, keys, kv_head):
    """Return the scales of a tile of keys, or of their values."""
    number, slot = keys
    row = number.to(gl.int64) * cache.scales_stride_n + slot.to(gl.int64) * cache.scales_stride_p
    row += kv_head.to(gl.int64) * cache.scales_stride_h
    return gl.load(cache.scales + row, mask=number >= 0, other=0.0)


@gluon.jit
def convert(codes, cache, ring, work, COUNT: gl.constexpr, plan: gl.constexpr):
    """Take all that `produce_codes` fetches to float16, and into the ring."""
    CODED: gl.constexpr = cache.data.dtype.element_ty
    step = 0
    ahead = load_entry(0, work)
    turns = num_turns(work)
    for turn in range(turns + 1):
        walk = tile_of(known(ahead, work, plan), work, plan).walk
        ahead = load_entry(turn + 1, work)
        for _ in range(gl.where(turn < turns, walk.hi - walk.lo, 1)):
            _convert_tile(codes, 2 * step, COUNT, ring.k, step, CODED, plan)
            _convert_tile(codes, 2 * step + 1, COUNT, ring.v, step - 1, CODED, plan)
            step += 1


# Four codes of a register become two registers, neighbours side by side, where decoding wants even
# and odd ones apart; the bits are those of Note [Pairs of elements] in attention_tiles.
_FROM_E4M3 = gl.constexpr(
    """{
    .reg .b16 low, high;
    mov.b32 {low, high}, $2;
    cvt.rn.f16x2.e4m3x2 $0, low;
    cvt.rn.f16x2.e4m3x2 $1, high;
    }"""
)
_FROM_E5M2 = gl.constexpr(
    """{
    .reg .b32 zero;
    mov.b32 zero, 0;
    prmt.b32 $0, $2, zero, 0x1404;
    prmt.b32 $1, $2, zero, 0x3424;
    }"""
)
_FROM_INT8 = gl.constexpr(
    """{
    .reg .b32 flipped, upper, base;
    mov.b32 upper, 0x64646464;
    mov.b32 base, 0x64806480;
    xor.b32 flipped, $2, 0x80808080;
    prmt.b32 $0, flipped, upper, 0x4140;
    prmt.b32 $1, flipped, upper, 0x4342;
    sub.rn.f16x2 $0, $0, base;
    sub.rn.f16x2 $1, $1, base;
    }"""
)


@gluon.jit
def _to_half(codes, CODED: gl.constexpr):
    FLOAT8: gl.constexpr = _FROM_E5M2 if gl.float8e5 == CODED else _FROM_E4M3
    return tl.inline_asm_elementwise(
        _FROM_INT8 if gl.int8 == CODED else FLOAT8,
        "=r,=r,r",
        [codes],
        dtype=gl.float16,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _convert_tile(
    codes,
    item,
    COUNT: gl.constexpr,
    stages,
    step,  # or -1, for a tile that nobody asks for
    CODED: gl.constexpr,
    plan: gl.constexpr,
):
    """Take a tile of codes to float16, when it is there and the consumers have left its stage."""
    # 8 codes a thread: so neither reading nor writing has bank conflicts.
    THREADS: gl.constexpr = min(plan.block_d, 128) // 8  # to a row
    LAYOUT: gl.constexpr = gl.BlockedLayout(
        [1, 8], [32 // THREADS, THREADS], [CONVERTERS, 1], [1, 0]
    )
    PARTS: gl.constexpr = 8  # as registers are few
    ROWS: gl.constexpr = plan.block_n // PARTS
    mbarrier.wait(codes.full.index(item % COUNT), item // COUNT & 1)
    if step >= 0:
        source = codes.matrices.index(item % COUNT)
        target = stages.matrices.index(step % STAGES)
        ahead = source.slice(0, ROWS).load(LAYOUT)
        mbarrier.wait(stages.free.index(step % STAGES), (step // STAGES & 1) ^ 1)
        for part in gl.static_range(PARTS):
            x = ahead
            if part + 1 < PARTS:
                ahead = source.slice((part + 1) * ROWS, ROWS).load(LAYOUT)
            target.slice(part * ROWS, ROWS).store(_to_half(x, CODED))
        fence_async_shared()
        barrier()
        mbarrier.arrive(stages.full.index(step % STAGES), count=1)
    mbarrier.arrive(codes.free.index(item % COUNT), count=1)
