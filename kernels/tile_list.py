"""The list of the tiles of queries of a ragged batch, which prefilling on Hopper works off.

A kernel writes the list; the programs of the next one take their tiles from it, turn by turn.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from torch_tkv.kernels.attention_geometry import (
    Blocks,
    Sequence,
    Walk,
    add2,
    full_query_tiles,
    query_tiles,
    sequence,
    sequence_of,
    walk_of,
)

FIELDS = tl.constexpr(8)  # of an entry: sequence, its start, count, length, tile of queries

# Note [Turns]
# The grid is as large as the GPU, and each program takes a tile of queries at every turn: the next
# one's keys are fetched while this one ends. A kernel before lists the tiles, those that see most
# tiles of keys first: each of its programs finds the place of one tile of queries by counting,
# sequence by sequence, how many see more. They are dealt out in this order, every other turn from
# the last program to the first, so all programs take about as long. Tiles that see about as many,
# of 16 tiles of keys or more, follow each other sequence by sequence, for the L2 cache's sake:
# programs then read the same keys at the same time.


class Work(NamedTuple):
    """The list of tiles of queries, and what its tiles are part of; see Note [Turns]."""

    tiles: Any  # [tiles + 1, FIELDS]
    num_tiles: Any  # that the list has room for
    batch: Any
    num_seqs: Any
    num_tokens: Any
    num_blocks: Any
    max_keys: Any
    kv_heads: Any


class Entry(NamedTuple):
    """An entry of the list: a sequence, a tile of its queries, and a KV head."""

    number: Any
    start: Any
    count: Any
    length: Any
    query_tile: Any
    kv_head: Any


class Tile(NamedTuple):
    """A tile of queries of one KV head."""

    seq: Any
    query_tile: Any  # of the sequence
    kv_head: Any
    blocks: Any
    walk: Any


@triton.jit
def _tiles_from(seq, keys, plan: tl.constexpr):
    """Return how many tiles of queries sequences have, and how many of them see `keys` or more."""
    count = query_tiles(seq.count, plan)
    if plan.max_queries is not None:  # the decoding part has the rest
        count = tl.where((seq.count <= plan.max_queries) | (seq.length == 0), 0, count)
    less = tl.zeros_like(count)
    if plan.causal:
        before = tl.maximum(keys - 1 - (seq.length - seq.count), 0)
        less = tl.minimum(full_query_tiles(before, plan), count)
    return count, tl.where(keys <= 0, count, tl.where(seq.length >= keys, count - less, 0))


@triton.jit
def _alike(tiles):
    """Return from how many tiles of keys on, and below how many, the first 4 bits are the same."""
    exponent = (tiles.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127  # exact below 2^24
    rest = tl.maximum(exponent - 3, 0)
    few = tiles >> rest << rest
    return few, few + (1 << rest)


@triton.jit(do_not_specialize=["num_seqs", "num_tokens", "max_blocks"])
def list_tiles(
    tiles,  # [tiles + 1, FIELDS]
    batch,
    num_seqs,  # B
    num_tokens,  # T
    max_blocks,
    plan: tl.constexpr,
):
    """List the tiles of queries, and behind them how many there are; see Note [Turns]."""
    if plan.pdl:
        tl.extra.cuda.gdc_launch_dependents()
    tile, room = tl.program_id(0), tl.num_programs(0)
    lanes, max_keys = tl.arange(0, plan.block_b), max_blocks * plan.page
    number, seq = sequence_of(tile, lanes, batch, num_seqs, num_tokens, max_keys, plan)
    mine = tile - (full_query_tiles(seq.start, plan) + number)
    walk = walk_of(seq, mine, plan)
    few, many = _alike(walk.hi)
    few, many = (few - 1) * plan.block_n + 1, (many - 1) * plan.block_n + 1
    place, total = 0, 0
    for b in range(0, num_seqs + 1, plan.block_b):
        others = b + lanes
        seqs = sequence(others, batch, num_seqs, num_tokens, max_keys)
        count, alike = _tiles_from(seqs, few, plan)
        _, more = _tiles_from(seqs, many, plan)
        before = tl.where(others < number, alike, more)
        counted = tl.reduce((before, count), 0, add2)
        place, total = place + counted[0], total + counted[1]
    count, more = _tiles_from(seq, many, plan)
    place += count - 1 - more - mine  # the last of a sequence sees most
    if (mine >= 0) & (mine < count) & (place >= 0) & (place < room):
        row = tiles + place * FIELDS
        tl.store(row, number)
        tl.store(row + 1, seq.start)
        tl.store(row + 2, seq.count)
        tl.store(row + 3, seq.length)
        tl.store(row + 4, mine)
    if tile == 0:
        tl.store(tiles + room * FIELDS, tl.minimum(total, room))
        if plan.pdl and plan.max_queries is not None:
            tl.extra.cuda.gdc_wait()  # this kernel must not end before the decoding part


@triton.jit
def _uniform(x):
    """Return a number that all threads of a warp share so that the compiler knows.

    What it does not know to be shared, it keeps in every thread: addresses of the ring made of it
    have to be moved to where the tensor cores want them, product by product.
    """
    shuffle: tl.constexpr = "shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;"
    return tl.inline_asm_elementwise(shuffle, "=r,r", [x], tl.int32, is_pure=False, pack=1)


@triton.jit
def _between(x, highest):
    return _uniform(tl.minimum(tl.maximum(x, 0), highest))


@triton.jit
def _item_of(turn):
    """Return the place in the list of what this program takes at a turn."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    return turn * programs + tl.where(turn % 2 == 0, program, programs - 1 - program)


@triton.jit
def num_turns(work):
    """Return how many tiles this program takes."""
    items = tl.load(work.tiles + work.num_tiles * FIELDS)
    items = _uniform(tl.minimum(tl.maximum(items, 0), work.num_tiles)) * work.kv_heads
    turns = items // tl.num_programs(0)
    return turns + (_item_of(turns) < items).to(tl.int32)


@triton.jit
def load_entry(turn, work):
    """Return the entry of the list that this program takes at a turn, the last one behind its end.

    It is loaded a turn ahead, and `known` when it is needed.
    """
    item = tl.minimum(_item_of(turn), work.num_tiles * work.kv_heads - 1)
    row = work.tiles + item // work.kv_heads * FIELDS
    number, start, count = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    length, query_tile = tl.load(row + 3), tl.load(row + 4)
    return Entry(number, start, count, length, query_tile, item % work.kv_heads)


@triton.jit
def known(entry, work, plan: tl.constexpr):
    """Return an entry as what was listed, if the indices are what they should be; uniform."""
    number = _between(entry.number, work.num_seqs)
    start = _between(entry.start, work.num_tokens)
    count = _between(entry.count, work.num_tokens - start)
    length = _between(entry.length, tl.where(number < work.num_seqs, work.max_keys, 0))
    query_tile = _between(entry.query_tile, full_query_tiles(count, plan))
    return Entry(number, start, count, length, query_tile, entry.kv_head)


@triton.jit
def tile_of(entry, work, plan: tl.constexpr):
    """Return the tile of an entry of the list."""
    seq = Sequence(entry.start, entry.count, entry.length)
    walk = walk_of(seq, entry.query_tile, plan)
    # What sees no key walks over a tile of keys that it does not see.
    hi = tl.maximum(walk.hi, walk.lo + 1)
    walk = Walk(walk.begin, walk.end, walk.lo, walk.masked_below, walk.masked_from, hi)
    batch = work.batch
    table = batch.block_table + entry.number.to(tl.int64) * batch.table_stride_b
    blocks = Blocks(table, batch.table_stride_n, work.num_blocks, walk.begin, walk.end)
    return Tile(seq, entry.query_tile, entry.kv_head, blocks, walk)
