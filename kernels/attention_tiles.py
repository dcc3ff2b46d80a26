"""Attention tile by tile: what all kernels of attention share.

A tile has M rows of queries, which are the G heads of a group for each of a few tokens, and n keys.
Scores are kept in units of log2, so the softmax is exp2. One online softmax (Milakov and
Gimelshein, 2018) serves all kernels; so do the masks and the score modifiers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from torch_tkv.kernels.cache_tiles import to_cache

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))


class Plan(NamedTuple):
    """What is compiled into a kernel of attention, but for dtypes and strides.

    Attributes:
        page: slots of a block, P.
        group: query heads of a KV head, G.
        size, value_size: D and Dv.
        key_strides, value_strides: of blocks, slots and heads. Multiplying by what is known only
            when the kernel runs costs decoding 3% (H200, Triton 3.6, 2026-11-21).
        causal, window, softcap: as in `torch_tkv.paged_attention`.
        block_d, block_dv: D and Dv, rounded up to a power of 2.
        block_q: tokens of a tile of queries.
        block_m: its rows, at least block_q * group; a power of 2.
        block_n: keys of a tile; a power of 2.
        block_b: sequences, of which each program scans all (decode) or as many at a time (prefill).
        pairs: values of 8 bits are read in pairs of this kind; None for one by one.
        workers: programs to a KV head that share the decoding.
        max_queries: longer sequences are prefilled; None if all are decoded.
        pdl: whether the merging kernel starts early (programmatic dependent launch).
    """

    page: int
    group: int
    size: int
    value_size: int
    key_strides: tuple[int, ...]
    value_strides: tuple[int, ...]
    causal: bool
    window: int | None
    softcap: float | None
    block_d: int
    block_dv: int
    block_q: int = 0
    block_m: int = 0
    block_n: int = 0
    block_b: int = 0
    pairs: str | None = None
    workers: int = 0
    max_queries: int | None = None
    pdl: bool = False


class Batch(NamedTuple):
    """Which rows of the query, and which blocks of the cache, are whose."""

    block_table: Any  # [B, max_blocks]
    table_stride_b: Any
    table_stride_n: Any
    seq_lens: Any  # [B]
    seq_lens_stride: Any
    query_start_loc: Any  # [B + 1]
    query_start_loc_stride: Any


class Cache(NamedTuple):
    """The cached keys, or the cached values."""

    data: Any  # [N, P, Hkv, D]
    scale: Any  # None, [] or [Hkv]
    scale_stride: Any
    scales: Any  # None or [N, P, Hkv]
    scales_stride_n: Any
    scales_stride_p: Any
    scales_stride_h: Any


class Options(NamedTuple):
    """Tensors that change the scores; None is nothing."""

    slopes: Any  # [Hq], of ALiBi
    sinks: Any  # [Hq]
    bias: Any  # [T, Q], between the new tokens of a sequence
    bias_stride_t: Any
    bias_stride_q: Any
    bias_width: Any  # Q


class Sequence(NamedTuple):
    """A sequence of the batch, or a tile of them."""

    start: Any  # first row of the query
    count: Any  # of its rows
    length: Any  # keys


class Rows(NamedTuple):
    """The rows of a tile of queries."""

    token: Any  # [M]
    head: Any  # [M]
    position: Any  # [M], of the token in its sequence
    inside: Any  # [M]


class Walk(NamedTuple):
    """The keys that a tile of queries sees."""

    begin: Any  # key position of the first
    end: Any  # and after the last
    lo: Any  # the tile of the first
    masked_below: Any  # tiles before this one, and
    masked_from: Any  # from this one on, hold keys that some query does not see
    hi: Any  # the tile after the last


class Blocks(NamedTuple):
    """A sequence's row of the block table."""

    row: Any  # [max_blocks]
    stride: Any
    num_blocks: Any  # N, of the cache
    begin: Any  # the first key position that is read
    end: Any  # and the one after the last


class Modifiers(NamedTuple):
    """What `modify` needs for a tile of queries."""

    slope: Any  # None or [M]
    bias: Any  # None or pointers [M] to rows of Options.bias
    bias_stride: Any
    bias_width: Any
    first_new: Any  # key position of the sequence's first new token


@triton.jit
def sequence(b, batch, num_seqs, num_tokens, max_keys):
    """Return sequence `b`, or a tile of sequences; number B is the padded rows, without keys."""
    starts = batch.query_start_loc + b * batch.query_start_loc_stride
    start = tl.load(starts, mask=b <= num_seqs, other=num_tokens)
    next_start = starts + batch.query_start_loc_stride
    stop = tl.load(next_start, mask=b < num_seqs, other=num_tokens)
    length = tl.load(batch.seq_lens + b * batch.seq_lens_stride, mask=b < num_seqs, other=0)
    # Indices may hold anything: nothing outside of the query and of the block table is touched.
    start = tl.minimum(tl.maximum(start, 0), num_tokens).to(tl.int32)
    stop = tl.minimum(tl.maximum(stop, start), num_tokens).to(tl.int32)
    length = tl.minimum(tl.maximum(length, 0), max_keys).to(tl.int32)
    return Sequence(start, stop - start, length)


@triton.jit
def tiles_of(keys, plan: tl.constexpr):
    """Return how many tiles hold that many keys."""
    return (keys + plan.block_n - 1) // plan.block_n


# Note [Query tiles of a ragged batch]
# The prefilling grid may depend on shapes only, so which sequence a tile belongs to is found on the
# device. With Q queries a tile, sequence b owns the tiles from query_start_loc[b] // Q + b on. It
# needs ceil(n / Q) of them for its n queries, and floor(s / Q) + ceil(n / Q) <= floor((s + n) / Q)
# + 1, so the tiles of two sequences never meet, and T // Q + B + 1 tiles serve every batch. The
# padded rows behind the last sequence are one more sequence, B, of no keys: its tiles write zeros.


@triton.jit
def _add4(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def sequence_of(tile, lanes, batch, num_seqs, num_tokens, max_keys, plan: tl.constexpr):
    """Return the number of the sequence that owns a tile of queries, and the sequence.

    `lanes` are 0 to block_b - 1: so many sequences are looked at together.
    """
    number, start, count, length = 0, 0, 0, 0
    for first in range(0, num_seqs + 1, plan.block_b):
        b = first + lanes
        seqs = sequence(b, batch, num_seqs, num_tokens, max_keys)
        begins = seqs.start // plan.block_q + b <= tile
        goes_on = (seqs.start + seqs.count) // plan.block_q + b >= tile
        this = (begins & goes_on & (b <= num_seqs)).to(tl.int32)
        picked = (b * this, seqs.start * this, seqs.count * this, seqs.length * this)
        picked = tl.reduce(picked, 0, _add4)
        number, start = number + picked[0], start + picked[1]
        count, length = count + picked[2], length + picked[3]
    # Starts that do not ascend may have picked several.
    start = tl.minimum(start, num_tokens)
    seq = Sequence(start, tl.minimum(count, num_tokens - start), tl.minimum(length, max_keys))
    return tl.minimum(number, num_seqs), seq


@triton.jit
def query_rows(m, seq, first, kv_head, plan: tl.constexpr):
    """Return rows `m` of the tile of the tokens from `first` of a sequence on."""
    token = first + m // plan.group
    inside = (m < plan.block_q * plan.group) & (token < seq.count)
    position = token + seq.length - seq.count
    return Rows(seq.start + token, kv_head * plan.group + m % plan.group, position, inside)


@triton.jit
def walk_of(seq, first, plan: tl.constexpr):
    """Return the walk of the tile of queries from token `first` of a sequence on."""
    first_new = seq.length - seq.count
    begin, end = 0, seq.length
    lo, masked_below = 0, 0
    masked_from = seq.length // plan.block_n
    if plan.causal:
        end = tl.minimum(end, first_new + first + plan.block_q)
        masked_from = tl.minimum(masked_from, tl.maximum(first_new + first + 1, 0) // plan.block_n)
    hi = tiles_of(tl.maximum(end, 0), plan)
    if plan.window is not None:
        begin = tl.maximum(first_new + first + 1 - plan.window, 0)
        lo = begin // plan.block_n
        last_begin = tl.maximum(first_new + first + plan.block_q - plan.window, 0)
        masked_below = tl.minimum(tl.maximum(tiles_of(last_begin, plan), lo), hi)
    return Walk(begin, end, lo, masked_below, tl.maximum(masked_from, masked_below), hi)


@triton.jit
def load_query(query, rows, stride_t, stride_h, plan: tl.constexpr):
    """Return the tile [M, block_d] of the query."""
    dim = tl.arange(0, plan.block_d)[None, :]
    row = query + rows.token.to(tl.int64) * stride_t + rows.head.to(tl.int64) * stride_h
    return tl.load(row[:, None] + dim, mask=rows.inside[:, None] & (dim < plan.size), other=0.0)


@triton.jit
def to_half(q):
    """Return bfloat16 rows as float16 rows, and the powers of 2 [M] that take these back."""
    x = q.to(tl.float32)
    top = tl.max(tl.abs(x), 1)
    power = tl.exp2(tl.floor(tl.log2(top)))
    power = tl.where((top > 0.0) & (top < float("inf")), power, 1.0)
    return (x / power[:, None]).to(tl.float16), power


@triton.jit
def visible(key_position, query_position, end, plan: tl.constexpr):
    """Return which keys [1, n] each query [M, 1] sees; `end` is the first that none does."""
    last = end - 1
    if plan.causal:
        last = tl.minimum(query_position, last)
    seen = key_position <= last
    if plan.window is not None:
        seen = seen & (key_position > query_position - plan.window)
    return seen


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
def load_blocks(blocks, tile, plan: tl.constexpr):
    """Return the block number of each key of a tile, -1 where there is no key."""
    position = tile * plan.block_n + tl.arange(0, plan.block_n)
    entry = blocks.row + (position.to(tl.uint32) // plan.page) * blocks.stride
    read = position < blocks.end
    if plan.window is not None:  # blocks that are behind all windows may have been freed
        read = read & (position >= blocks.begin)
    return tl.load(entry, mask=read, other=-1)


@triton.jit
def slot_offset(tile, plan: tl.constexpr):
    """Return the offset in its block of each key of a tile."""
    n = tl.arange(0, plan.block_n)
    if plan.block_n % plan.page != 0:
        n += tile * plan.block_n
    return n % plan.page


@triton.jit
def load_rows(
    data,  # at the KV head
    block,  # [n]
    blocks,
    tile,
    STRIDE_N: tl.constexpr,
    STRIDE_P: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    plan: tl.constexpr,
):
    """Return the rows [n, BLOCK] of a tile of keys, zero where there is no such block."""
    block = block[:, None]
    row = block.to(tl.int64) * STRIDE_N + slot_offset(tile, plan)[:, None].to(tl.int64) * STRIDE_P
    dim = tl.arange(0, BLOCK)[None, :]
    inside = (block >= 0) & (block < blocks.num_blocks)
    if SIZE != BLOCK:
        inside = inside & (dim < SIZE)
    return tl.load(data + row + dim, mask=inside, other=0.0)


@triton.jit
def load_scales(cache, kv_head, block, blocks, tile, plan: tl.constexpr):
    """Return the scales [n] of a tile of keys, zero where there is no such block."""
    row = block.to(tl.int64) * cache.scales_stride_n
    row += slot_offset(tile, plan).to(tl.int64) * cache.scales_stride_p
    row += kv_head.to(tl.int64) * cache.scales_stride_h
    inside = (block >= 0) & (block < blocks.num_blocks)
    return tl.load(cache.scales + row, mask=inside, other=0.0)


@triton.jit
def scale_of_head(cache, kv_head):
    """Return the scale that all of a head's elements share."""
    scale = 1.0
    if cache.scale is not None:
        scale = tl.load(cache.scale + kv_head * cache.scale_stride)
    return scale


# Note [Pairs of values]
# The tensor cores want values transposed. On the way from shared memory only 16-bit elements can
# be; values of 8 bits would be read byte by byte, at half the speed. So two neighbours in a row are
# read as one int16, which is taken apart in registers: the even and the odd dimensions of the
# values get an accumulator each.


@triton.jit
def take_apart(pairs, plan: tl.constexpr):
    """Return even and odd elements of int16 pairs as float16; see Note [Pairs of values]."""
    if plan.pairs == "int8":
        even, odd = ((pairs << 8) >> 8).to(tl.float16), (pairs >> 8).to(tl.float16)
    elif plan.pairs == "fp8e5":
        even = (pairs << 8).to(tl.float16, bitcast=True)
        odd = (pairs & -256).to(tl.float16, bitcast=True)
    else:
        # Each register holds two pairs: gather their low, or high, bytes and convert both.
        even, odd = tl.inline_asm_elementwise(
            """{
            .reg .b32 even, odd;
            .reg .b16 low, none;
            prmt.b32 even, $2, $2, 0x0020;
            prmt.b32 odd, $2, $2, 0x0031;
            mov.b32 {low, none}, even;
            cvt.rn.f16x2.e4m3x2 $0, low;
            mov.b32 {low, none}, odd;
            cvt.rn.f16x2.e4m3x2 $1, low;
            }""",
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return even, odd


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
    q,  # [M, block_d]
    scale,  # [M], positive
    rows,
    lo,  # tiles of keys
    hi,
    keys,
    values,
    blocks,
    kv_head,
    modifiers,
    MASKED: tl.constexpr,  # whether some query may not see some key of these tiles
    plan: tl.constexpr,
):
    """Return the online softmax after the tiles `lo : hi` of keys."""
    highest, total, acc, block = state
    MODIFIED: tl.constexpr = (plan.softcap is not None) or (
        (modifiers.slope is not None) or (modifiers.bias is not None)
    )
    factor = scale * LOG2E
    if MODIFIED:
        factor = tl.full([plan.block_m], LOG2E, tl.float32)
    STRIDE_N: tl.constexpr = plan.key_strides[0]
    STRIDE_P: tl.constexpr = plan.key_strides[1]
    SIZE: tl.constexpr = plan.size
    BLOCK: tl.constexpr = plan.block_d
    # Elements of a row of values that are read as one.
    TOGETHER: tl.constexpr = 1 if plan.pairs is None else 2
    VALUE_STRIDE_N: tl.constexpr = plan.value_strides[0] // TOGETHER
    VALUE_STRIDE_P: tl.constexpr = plan.value_strides[1] // TOGETHER
    VALUE_SIZE: tl.constexpr = plan.value_size // TOGETHER
    VALUE_BLOCK: tl.constexpr = plan.block_dv // TOGETHER
    key_data = keys.data + kv_head.to(tl.int64) * plan.key_strides[2]
    value_data = values.data + kv_head.to(tl.int64) * plan.value_strides[2]
    if plan.pairs is not None:
        value_data = value_data.to(tl.pointer_type(tl.int16), bitcast=True)
    # Block numbers are loaded one tile ahead. Loaded where they are used, they would take two of
    # the stages in which Triton's pipeliner fetches keys and values. What is carried over has to be
    # the load itself: anything computed from it would be waited for at once.
    for tile in range(lo, hi):
        next_block = load_blocks(blocks, tile + 1, plan)
        k = load_rows(key_data, block, blocks, tile, STRIDE_N, STRIDE_P, SIZE, BLOCK, plan)
        v = load_rows(
            value_data,
            block,
            blocks,
            tile,
            VALUE_STRIDE_N,
            VALUE_STRIDE_P,
            VALUE_SIZE,
            VALUE_BLOCK,
            plan,
        )
        scores = tl.dot(q, k.to(q.dtype).T, input_precision="ieee")  # [M, n]
        if keys.scales is not None:
            scores *= load_scales(keys, kv_head, block, blocks, tile, plan)[None, :]
        key_position = (tile * plan.block_n + tl.arange(0, plan.block_n))[None, :]
        query_position = rows.position[:, None]
        if MODIFIED:
            scores = modify(scores * scale[:, None], key_position, query_position, modifiers, plan)
        if MASKED:
            seen = visible(key_position, query_position, blocks.end, plan)
            scores = tl.where(seen, scores, float("-inf"))
        weights, rescale, highest, total = softmax_step(scores, factor, highest, total)
        if values.scales is not None:
            weights *= load_scales(values, kv_head, block, blocks, tile, plan)[None, :]
        acc = weighted(weights.to(q.dtype), v, acc, rescale, plan)
        block = next_block
    return highest, total, acc, block


@triton.jit
def finish(acc, highest, total, sink):
    """Return the weighted mean of the values, and the log2 of the sum of the weights.

    `sink` is None, or the score in units of log2 of one more key, without a value.
    """
    nothing = total == 0.0  # a query that sees no key gives zeros
    if sink is not None:
        top = tl.maximum(highest, sink)
        shift = tl.where(top == float("-inf"), 0.0, top)
        rescale = tl.exp2(highest - shift)
        total = total * rescale + tl.exp2(sink - shift)
        acc = acc * rescale
        highest = top
    lse = tl.where(nothing, float("-inf"), highest + tl.log2(total))
    return acc / tl.where(nothing, 1.0, total), lse


@triton.jit
def store_result(
    out,  # [T, Hq, Dv]
    lse_out,  # None or [T, Hq]
    acc,
    highest,
    total,
    token,
    head,
    dim,
    inside,
    num_heads,
    kv_head,
    values,
    sinks,
    output_scale,
    SATURATES: tl.constexpr,
    plan: tl.constexpr,
):
    """Finish and store rows of the result; all tiles are of one shape, or broadcast to it."""
    sink = None
    if sinks is not None:
        sink = tl.load(sinks + head, mask=inside, other=0.0).to(tl.float32) * LOG2E
    mean, lse = finish(acc, highest, total, sink)
    mean *= scale_of_head(values, kv_head)
    row = token.to(tl.int64) * num_heads + head
    inside = inside & (dim < plan.value_size)
    x = to_cache(mean, output_scale, None, head, inside, out.dtype.element_ty, SATURATES)
    tl.store(out + row * plan.value_size + dim, x, mask=inside)
    if lse_out is not None:
        # Each row is stored by its first column.
        tl.store(lse_out + row + 0 * dim, lse * LN2, mask=inside & (dim == 0))
