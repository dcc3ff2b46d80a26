"""What attention is given, and who attends to what: ragged batches, tiles of queries, blocks.

The rows of a sequence are the G heads of a group for each of its tokens: row r is head r % G of
token r // G. A tile is of n keys, or of M rows of queries: consecutive ones, and padding.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

# Arguments of all kernels that change from call to call.
SIZES = ["num_seqs", "num_tokens", "num_blocks", "max_blocks"]


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
        tile_rows: rows of a sequence that a tile of queries takes.
        block_m: rows that are computed for them; a power of 2, or 192 on Hopper.
        block_n: keys of a tile; a power of 2.
        block_b: sequences, of which each program scans all (decode) or as many at a time (prefill).
        pairs: caches of 8 bits are read in pairs of this kind; None for one by one.
        converts: caches of 8 bits are converted in shared memory, on Hopper.
        workers: programs to a KV head that share the decoding.
        max_queries: longer sequences are prefilled; None if all are decoded.
        pdl: whether the next kernel starts early (programmatic dependent launch).
        numbers: block numbers that are loaded for a tile of keys: one a block, or one a key where
            blocks are cut by tiles, and where 128 threads share 128 keys of 8 bits.
        tile_tokens: tokens of a tile of queries, tile_rows / group, in lowest terms: kernels whose
            tiles take whole tokens so divide by 1.
        most_tokens: that a tile of queries has rows of.
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
    tile_rows: int = 0
    block_m: int = 0
    block_n: int = 0
    block_b: int = 0
    pairs: str | None = None
    converts: bool = False
    workers: int = 0
    max_queries: int | None = None
    pdl: bool = False
    # What follows from the others; see `complete`.
    numbers: int = 0
    tile_tokens: tuple[int, int] = (0, 0)
    most_tokens: int = 0


def complete(plan: Plan) -> Plan:
    """Return `plan` with what follows from its other fields. Triton 3.9 knows no properties."""
    if plan.page % plan.block_n == 0:
        numbers = 1
    elif plan.block_n % plan.page == 0 and (plan.pairs is None or plan.block_n < 128):
        numbers = plan.block_n // plan.page
    else:
        numbers = plan.block_n
    common = math.gcd(plan.tile_rows, plan.group)
    rows, group = plan.tile_rows // common, plan.group // common
    most_tokens = (rows - 2) // group + 2
    return plan._replace(numbers=numbers, tile_tokens=(rows, group), most_tokens=most_tokens)


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
def add2(a, b, c, d):
    """Add pairs, for a reduction."""
    return a + c, b + d


@triton.jit
def tiles_of(keys, plan: tl.constexpr):
    """Return how many tiles hold that many keys."""
    return (keys + plan.block_n - 1) // plan.block_n


@triton.jit
def query_tiles(tokens, plan: tl.constexpr):
    """Return how many tiles of queries hold the rows of that many tokens."""
    return (tokens * plan.tile_tokens[1] + plan.tile_tokens[0] - 1) // plan.tile_tokens[0]


@triton.jit
def full_query_tiles(tokens, plan: tl.constexpr):
    """Return how many tiles of queries the rows of that many tokens fill."""
    return tokens * plan.tile_tokens[1] // plan.tile_tokens[0]


@triton.jit
def tokens_of(query_tile, plan: tl.constexpr):
    """Return the first token of a tile of queries of a sequence, and the one after the last."""
    begin = query_tile * plan.tile_tokens[0]
    end = begin + plan.tile_tokens[0]
    return begin // plan.tile_tokens[1], (end + plan.tile_tokens[1] - 1) // plan.tile_tokens[1]


# Note [Query tiles of a ragged batch]
# The prefilling grid may depend on shapes only, so which sequence a tile belongs to is found on the
# device. With R rows a tile, sequence b owns the tiles from s // R + b on where s rows precede it.
# It needs ceil(n / R) of them for its n rows, and floor(s / R) + ceil(n / R) <= floor((s + n) / R)
# + 1, so the tiles of two sequences never meet, and T * G // R + B + 1 tiles serve every batch. The
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
        begins = full_query_tiles(seqs.start, plan) + b <= tile
        goes_on = full_query_tiles(seqs.start + seqs.count, plan) + b >= tile
        this = (begins & goes_on & (b <= num_seqs)).to(tl.int32)
        picked = (b * this, seqs.start * this, seqs.count * this, seqs.length * this)
        picked = tl.reduce(picked, 0, _add4)
        number, start = number + picked[0], start + picked[1]
        count, length = count + picked[2], length + picked[3]
    # Starts that do not ascend may have picked several.
    number, start = tl.minimum(number, num_seqs), tl.minimum(start, num_tokens)
    length = tl.where(number < num_seqs, tl.minimum(length, max_keys), 0)
    return number, Sequence(start, tl.minimum(count, num_tokens - start), length)


@triton.jit
def query_rows(m, seq, query_tile, kv_head, plan: tl.constexpr):
    """Return rows `m` of a tile of queries of a sequence."""
    first, _ = tokens_of(query_tile, plan)
    # The tile before may have taken rows of the first token.
    taken = query_tile * plan.tile_tokens[0] % plan.tile_tokens[1]
    row = m + taken * (plan.group // plan.tile_tokens[1])
    token = first + row // plan.group
    inside = (m < plan.tile_rows) & (token < seq.count)
    position = token + seq.length - seq.count
    return Rows(seq.start + token, kv_head * plan.group + row % plan.group, position, inside)


@triton.jit
def walk_of(seq, query_tile, plan: tl.constexpr):
    """Return the walk of a tile of queries of a sequence."""
    first_new = seq.length - seq.count
    first, stop = tokens_of(query_tile, plan)
    begin, end = 0, seq.length
    lo, masked_below = 0, 0
    masked_from = seq.length // plan.block_n
    if plan.causal:
        end = tl.minimum(end, first_new + stop)
        masked_from = tl.minimum(masked_from, tl.maximum(first_new + first + 1, 0) // plan.block_n)
    hi = tiles_of(tl.maximum(end, 0), plan)
    if plan.window is not None:
        begin = tl.maximum(first_new + first + 1 - plan.window, 0)
        lo = begin // plan.block_n
        last_begin = tl.maximum(first_new + stop - plan.window, 0)
        masked_below = tl.minimum(tl.maximum(tiles_of(last_begin, plan), lo), hi)
    return Walk(begin, end, lo, masked_below, tl.maximum(masked_from, masked_below), hi)


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


# Note [Block numbers]
# Block numbers are loaded one tile of keys ahead. Loaded where they are used, they would take two
# of the stages in which Triton's pipeliner fetches keys and values. What is carried over has to be
# the load itself: anything computed from it, or a value for what its mask leaves out, would be
# waited for at once. So what is not read is undefined, and told apart by `rows_of`.
#
# A thread loads one number a block and not one a key, where blocks are whole in a tile. With this,
# fewer checks of each number and no mask for most tiles, 1 x 1024 keys are decoded in 7.1 instead
# of 7.4 us, 4 x 1024 in 10.6 instead of 11.2 and 128 x 1024 in 132.9 instead of 134.4 (H200, Triton
# 3.6, 2026-11-30).


@triton.jit
def load_blocks(blocks, tile, plan: tl.constexpr):
    """Return the block numbers of a tile of keys, for `rows_of`; what is not read is undefined."""
    COUNT: tl.constexpr = plan.numbers
    EACH: tl.constexpr = plan.block_n // COUNT  # keys, or fewer, that share a number
    position = tile * plan.block_n + EACH * tl.arange(0, COUNT)
    read = position < blocks.end
    if plan.window is not None:  # blocks that are behind all windows may have been freed
        read = read & (position + EACH > blocks.begin)
    entry = blocks.row + (position.to(tl.uint32) // plan.page) * blocks.stride
    return tl.load(entry, mask=read)


@triton.jit
def rows_of(numbers, blocks, tile, MASKED: tl.constexpr, plan: tl.constexpr):
    """Return the block number of each key of a tile, and whether there is one that is read.

    Of a tile that is not MASKED all keys are read.
    """
    COUNT: tl.constexpr = plan.numbers
    block = numbers
    if plan.block_n != COUNT:
        shared = tl.broadcast_to(numbers[:, None], [COUNT, plan.block_n // COUNT])
        block = tl.reshape(shared, [plan.block_n])
    # What is negative is beyond num_blocks when taken as unsigned.
    UNSIGNED: tl.constexpr = tl.uint64 if block.dtype == tl.int64 else tl.uint32
    inside = block.to(UNSIGNED, bitcast=True) < blocks.num_blocks.to(UNSIGNED)
    if MASKED:
        n = tl.arange(0, plan.block_n)
        inside = inside & (n < blocks.end - tile * plan.block_n)
        if plan.window is not None:
            inside = inside & (n >= blocks.begin - tile * plan.block_n)
    return block, inside


@triton.jit
def slot_offset(tile, plan: tl.constexpr):
    """Return the offset in its block of each key of a tile."""
    n = tl.arange(0, plan.block_n)
    if plan.block_n % plan.page != 0:
        n += tile * plan.block_n
    return n % plan.page
