"""Attention tile by tile: what all kernels of attention compute alike.

Scores are kept in units of log2, so the softmax is exp2. One online softmax (Milakov and
Gimelshein, 2018) serves all kernels; so do the masks and the score modifiers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from torch_tkv.kernels.attention_geometry import (
    Blocks,
    load_blocks,
    query_rows,
    rows_of,
    slot_offset,
    visible,
    walk_of,
)

LOG2E = tl.constexpr(math.log2(math.e))


class Inputs(NamedTuple):
    """What attention is computed from."""

    query: Any  # [T, Hq, D]
    stride_t: Any
    stride_h: Any
    key_cache: Any
    value_cache: Any
    batch: Any
    extra: Any
    scale: Any
    num_blocks: Any  # N


class Modifiers(NamedTuple):
    """What `modify` needs for a tile of queries."""

    slope: Any  # None or [M]
    bias: Any  # None or pointers [M] to rows of Options.bias
    bias_stride: Any
    bias_width: Any
    first_new: Any  # key position of the sequence's first new token


@triton.jit
def load_query(inputs, rows, plan: tl.constexpr):
    """Return the query, as a tuple: [M, block_d], or its even and its odd columns for pairs."""
    row = inputs.query + rows.token.to(tl.int64) * inputs.stride_t
    row = (row + rows.head.to(tl.int64) * inputs.stride_h)[:, None]
    inside = rows.inside[:, None]
    if plan.pairs is None:
        dim = tl.arange(0, plan.block_d)[None, :]
        return (tl.load(row + dim, mask=inside & (dim < plan.size), other=0.0),)
    else:
        even = 2 * tl.arange(0, plan.block_d // 2)[None, :]
        inside = inside & (even < plan.size)
        odd = tl.load(row + even + 1, mask=inside, other=0.0)
        return tl.load(row + even, mask=inside, other=0.0), odd


@triton.jit
def _scaled(x, power):
    return (x.to(tl.float32) * power[:, None]).to(tl.float16)


@triton.jit
def to_half(q, plan: tl.constexpr):
    """Return what `load_query` returned as float16, and the powers of 2 [M] that take it back."""
    size = tl.abs(q[0].to(tl.float32))
    if plan.pairs is not None:
        size = tl.maximum(size, tl.abs(q[1].to(tl.float32)))
    # Both powers are normal numbers.
    top = tl.minimum(tl.maximum(tl.max(size, 1), 2.0**-120), 2.0**126)
    exponent = tl.floor(tl.log2(top))
    power = tl.exp2(-exponent)
    if plan.pairs is None:
        return (_scaled(q[0], power),), tl.exp2(exponent)
    else:
        return (_scaled(q[0], power), _scaled(q[1], power)), tl.exp2(exponent)


@triton.jit
def modify(scores, key_position, query_position, modifiers, plan: tl.constexpr):
    """Return scaled scores [M, n] with softcap, ALiBi and query bias, in this order."""
    if plan.softcap is not None:
        # tanh(x) = 1 - 2 / (1 + exp(2 x)), which holds at both ends.
        exp = tl.exp2(scores * (2 * LOG2E / plan.softcap))
        scores = plan.softcap * (1.0 - 2.0 / (1.0 + exp))
    if modifiers.slope is not None:
        scores += modifiers.slope[:, None] * (key_position - query_position).to(tl.float32)
    if modifiers.bias is not None:
        column = key_position - modifiers.first_new
        biased = (column >= 0) & (column < modifiers.bias_width)
        place = modifiers.bias[:, None] + column * modifiers.bias_stride
        scores += tl.load(place, mask=biased, other=0.0)
    return scores


@triton.jit
def softmax_step(scores, factor, highest, total):
    """Take a tile of scores [M, n] into the online softmax.

    `factor` [M] > 0 takes scores to units of log2; a key that is not seen has -inf. Returns the
    weights of the tile, the factor of what was summed before, and the new state.
    """
    top = tl.maximum(highest, tl.max(scores, 1) * factor)
    shift = tl.where(top == float("-inf"), 0.0, top)  # of a row that has seen no key yet
    weights = tl.exp2(scores * factor[:, None] - shift[:, None])
    rescale = tl.exp2(highest - shift)
    return weights, rescale, top, total * rescale + tl.sum(weights, 1)


@triton.jit
def head_of(cache, kv_head, VALUES: tl.constexpr, plan: tl.constexpr):
    """Return the data of a cache, of keys or of VALUES, at a KV head: pairs, if read so."""
    data = cache.data + kv_head.to(tl.int64) * (
        plan.value_strides[2] if VALUES else plan.key_strides[2]
    )
    if plan.pairs is not None:
        data = data.to(tl.pointer_type(tl.int16), bitcast=True)
    return data


@triton.jit
def load_rows(data, block, inside, tile, VALUES: tl.constexpr, plan: tl.constexpr):
    """Return the rows of a tile of keys, or their VALUES, zero where they are not inside.

    `data` is that of `head_of`; the rows are [n, block_d], or half as wide if they are of pairs.
    """
    TOGETHER: tl.constexpr = 1 if plan.pairs is None else 2
    SIZE: tl.constexpr = plan.value_size if VALUES else plan.size
    BLOCK: tl.constexpr = plan.block_dv if VALUES else plan.block_d
    STRIDE_N: tl.constexpr = plan.value_strides[0] if VALUES else plan.key_strides[0]
    STRIDE_P: tl.constexpr = plan.value_strides[1] if VALUES else plan.key_strides[1]
    dim = tl.arange(0, BLOCK // TOGETHER)[None, :]
    # What most tiles share is added first, and once.
    data = data + slot_offset(tile, plan)[:, None].to(tl.int64) * (STRIDE_P // TOGETHER) + dim
    inside = inside[:, None]
    if SIZE != BLOCK:
        inside = inside & (dim < SIZE // TOGETHER)
    return tl.load(
        data + block[:, None].to(tl.int64) * (STRIDE_N // TOGETHER), mask=inside, other=0.0
    )


@triton.jit
def load_scales(cache, kv_head, block, inside, tile, plan: tl.constexpr):
    """Return the scales [n] of a tile of keys, zero where they are not inside."""
    row = block.to(tl.int64) * cache.scales_stride_n
    row += slot_offset(tile, plan).to(tl.int64) * cache.scales_stride_p
    row += kv_head.to(tl.int64) * cache.scales_stride_h
    return tl.load(cache.scales + row, mask=inside, other=0.0)


@triton.jit
def scale_of_head(cache, kv_head):
    """Return the scale that all of a head's elements share."""
    scale = 1.0
    if cache.scale is not None:
        scale = tl.load(cache.scale + kv_head * cache.scale_stride)
    return scale


# Note [Pairs of elements]
# Two neighbours in a row of 8-bit elements are read as one int16, which is taken apart in registers
# to float16: the even and the odd dimensions of queries and keys are multiplied apart, and those of
# the values get an accumulator each. Values, because the tensor cores want them transposed, which
# only 16-bit elements can be on the way from shared memory: others would be read byte by byte, at
# half the speed. Keys, because then the queries, too, are read as the tensor cores want them: a
# tile of 128 keys takes 658 instructions instead of 738, and 32 x 8192 keys 6% less time (H200,
# Triton 3.6, 2026-11-30).
#
# A register holds two pairs. A float8_e5m2 is the upper half of a float16. Flipped into the lowest
# bits of 1152, which is 0x6480 as a float16, an int8 is added to it.

_FROM_E4M3 = tl.constexpr(
    """{
    .reg .b32 even, odd;
    .reg .b16 low, none;
    prmt.b32 even, $2, $2, 0x0020;
    prmt.b32 odd, $2, $2, 0x0031;
    mov.b32 {low, none}, even;
    cvt.rn.f16x2.e4m3x2 $0, low;
    mov.b32 {low, none}, odd;
    cvt.rn.f16x2.e4m3x2 $1, low;
    }"""
)
_FROM_E5M2 = tl.constexpr(
    """{
    .reg .b32 zero;
    mov.b32 zero, 0;
    prmt.b32 $0, $2, zero, 0x2404;
    and.b32 $1, $2, 0xff00ff00;
    }"""
)
_FROM_INT8 = tl.constexpr(
    """{
    .reg .b32 even, odd, base;
    mov.b32 base, 0x64806480;
    lop3.b32 even, $2, 0x00ff00ff, base, 0x6a;
    shr.u32 odd, $2, 8;
    lop3.b32 odd, odd, 0x00ff00ff, base, 0x6a;
    sub.rn.f16x2 $0, even, base;
    sub.rn.f16x2 $1, odd, base;
    }"""
)


@triton.jit
def take_apart(pairs, plan: tl.constexpr):
    """Return even and odd elements of int16 pairs as float16; see Note [Pairs of elements]."""
    FLOAT8: tl.constexpr = _FROM_E5M2 if plan.pairs == "fp8e5" else _FROM_E4M3
    return tl.inline_asm_elementwise(
        _FROM_INT8 if plan.pairs == "int8" else FLOAT8,
        "=r,=r,r",
        [pairs],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def multiplied(q, k, plan: tl.constexpr):
    """Return q @ k^T [M, n]; q is as in `load_query`."""
    if plan.pairs is None:
        return tl.dot(q[0], k.to(q[0].dtype).T, input_precision="ieee")
    else:
        even, odd = take_apart(k, plan)
        return tl.dot(q[1], odd.T, tl.dot(q[0], even.T))


@triton.jit
def weighted(weights, v, acc, rescale, plan: tl.constexpr):
    """Return `acc * rescale + weights @ v`; acc is one tile, or that of even and of odd columns."""
    if plan.pairs is None:
        v = v.to(weights.dtype)
        return (tl.dot(weights, v, acc[0] * rescale[:, None], input_precision="ieee"),)
    else:
        even, odd = take_apart(v, plan)
        even = tl.dot(weights, even, acc[0] * rescale[:, None])
        return even, tl.dot(weights, odd, acc[1] * rescale[:, None])


@triton.jit
def attend(
    state,  # highest [M], total [M], acc as in `weighted`, and the block numbers of tile `lo`
    q,  # as in `load_query`
    scale,  # [M], positive
    rows,
    lo,  # tiles of keys
    hi,
    keys,
    values,
    blocks,
    kv_head,
    modifiers,
    walk,
    MASKED: tl.constexpr,  # whether some query may not see some key of these tiles
    plan: tl.constexpr,
):
    """Return the online softmax after the tiles `lo : hi` of keys."""
    highest, total, acc, numbers = state
    MODIFIED: tl.constexpr = (plan.softcap is not None) or (
        (modifiers.slope is not None) or (modifiers.bias is not None)
    )
    factor = scale * LOG2E
    if MODIFIED:
        factor = tl.full([plan.block_m], LOG2E, tl.float32)
    key_data = head_of(keys, kv_head, False, plan)
    value_data = head_of(values, kv_head, True, plan)
    # See Note [Block numbers] in attention_geometry.
    for tile in range(lo, hi):
        next_numbers = load_blocks(blocks, tile + 1, plan)
        block, inside = rows_of(numbers, blocks, tile, MASKED, plan)
        k = load_rows(key_data, block, inside, tile, False, plan)
        v = load_rows(value_data, block, inside, tile, True, plan)
        scores = multiplied(q, k, plan)
        if keys.scales is not None:
            scores *= load_scales(keys, kv_head, block, inside, tile, plan)[None, :]
        key_position = (tile * plan.block_n + tl.arange(0, plan.block_n))[None, :]
        query_position = rows.position[:, None]
        if MODIFIED:
            scores = modify(scores * scale[:, None], key_position, query_position, modifiers, plan)
        if MASKED:
            # Few tiles need it. With 128 keys of 8 bits a branch costs more than it saves: 32 x
            # 4096 take 75.0 instead of 73.8 us (H200, Triton 3.6, 2026-11-30).
            ALWAYS: tl.constexpr = (plan.pairs is not None) and plan.block_n == 128
            if ALWAYS | (tile < walk.masked_below) | (tile >= walk.masked_from):
                seen = visible(key_position, query_position, blocks.end, plan)
                scores = tl.where(seen, scores, float("-inf"))
        weights, rescale, highest, total = softmax_step(scores, factor, highest, total)
        if values.scales is not None:
            weights *= load_scales(values, kv_head, block, inside, tile, plan)[None, :]
        acc = weighted(weights.to(q[0].dtype), v, acc, rescale, plan)
        numbers = next_numbers
    return highest, total, acc, numbers


@triton.jit
def attend_tile(
    inputs,
    seq,
    number,
    query_tile,
    lo,
    hi,
    kv_head,
    TO_THE_END: tl.constexpr,
    plan: tl.constexpr,
):
    """Return the rows of a tile of queries, and the state of their softmax.

    The tiles of keys are `lo : hi` or, TO_THE_END, those that some query of the tile sees.
    """
    keys, values, extra = inputs.key_cache, inputs.value_cache, inputs.extra
    walk = walk_of(seq, query_tile, plan)
    if TO_THE_END:
        lo, hi = walk.lo, walk.hi
    batch = inputs.batch
    table = batch.block_table + number.to(tl.int64) * batch.table_stride_b
    blocks = Blocks(table, batch.table_stride_n, inputs.num_blocks, walk.begin, walk.end)
    numbers = load_blocks(blocks, lo, plan)  # before the query, which is waited for

    rows = query_rows(tl.arange(0, plan.block_m), seq, query_tile, kv_head, plan)
    q = load_query(inputs, rows, plan)
    factor = tl.full([plan.block_m], 1.0, tl.float32) * (
        inputs.scale * scale_of_head(keys, kv_head)
    )
    if keys.data.dtype.element_ty.primitive_bitwidth == 8 and q[0].dtype == tl.bfloat16:
        q, power = to_half(q, plan)
        factor *= power
    slope, bias = None, None
    if extra.slopes is not None:
        slope = tl.load(extra.slopes + rows.head, mask=rows.inside, other=0.0)
    if extra.bias is not None:
        # Rows behind the last token have no bias to read.
        token = tl.where(rows.inside, rows.token, 0)
        bias = extra.bias + token.to(tl.int64) * extra.bias_stride_t
    first_new = seq.length - seq.count
    modifiers = Modifiers(slope, bias, extra.bias_stride_q, extra.bias_width, first_new)

    highest = tl.full([plan.block_m], float("-inf"), tl.float32)
    total = tl.full([plan.block_m], 0.0, tl.float32)
    if plan.pairs is None:
        acc = (tl.full([plan.block_m, plan.block_dv], 0.0, tl.float32),)
    else:
        half = tl.full([plan.block_m, plan.block_dv // 2], 0.0, tl.float32)
        acc = (half, half)  # type: ignore[assignment]
    state = (highest, total, acc, numbers)
    tile = (q, factor, rows)
    cache = (keys, values, blocks, kv_head, modifiers, walk)
    if TO_THE_END:
        if plan.window is not None:
            state = attend(state, *tile, lo, walk.masked_below, *cache, True, plan)
            lo = walk.masked_below
        state = attend(state, *tile, lo, walk.masked_from, *cache, False, plan)
        lo = walk.masked_from
    state = attend(state, *tile, lo, hi, *cache, True, plan)
    highest, total, acc, _ = state
    if plan.pairs is None:
        out = acc[0]
    else:
        out = tl.reshape(tl.join(acc[0], acc[1]), (plan.block_m, plan.block_dv))
    return rows, highest, total, out
