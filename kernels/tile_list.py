"""List the tiles of queries of a ragged batch: the first of the kernels that prefill on Hopper."""

from __future__ import annotations

import triton
import triton.language as tl

from torch_tkv.kernels.attention_geometry import add2, sequence, sequence_of, tiles_of

FIELDS = tl.constexpr(8)  # of an entry: sequence, its start, count and length, and first token

# Note [Turns]
# The grid is as large as the GPU, and each program takes a tile of queries at every turn: the next
# one's keys are fetched while this one ends. A kernel before lists the tiles, those that see most
# tiles of keys first: each of its programs finds the place of one tile of queries by counting,
# sequence by sequence, how many see more. They are dealt out in this order, every other turn from
# the last program to the first, so all programs take about as long. (Sequence after sequence
# would leave some programs a quarter more to do than others, counting tiles of keys. An order of three tiles of keys at a time, for
# the L2 cache's sake, cost 16 prompts of 1024 tokens a fifth and gained nothing: H200, Triton 3.6,
# 2026-11-21.)


@triton.jit
def _tiles_from(seq, keys, plan: tl.constexpr):
    """Return how many tiles of queries sequences have, and how many of them see `keys` or more."""
    count = (seq.count + plan.block_q - 1) // plan.block_q
    if plan.max_queries is not None:  # the decoding part has the rest
        count = tl.where((seq.count <= plan.max_queries) | (seq.length == 0), 0, count)
    less = tl.zeros_like(count)
    if plan.causal:
        before = tl.maximum(keys - 1 - (seq.length - seq.count), 0)
        less = tl.minimum(before // plan.block_q, count)
    return count, tl.where(keys <= 0, count, tl.where(seq.length >= keys, count - less, 0))


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
    mine = tile - (seq.start // plan.block_q + number)
    end = seq.length
    if plan.causal:
        end = tl.minimum(end, seq.length - seq.count + (mine + 1) * plan.block_q)
    keys = tiles_of(tl.maximum(end, 0), plan) * plan.block_n
    keys -= plan.block_n - 1  # the first of its last tile of keys
    place, total = 0, 0
    for b in range(0, num_seqs + 1, plan.block_b):
        others = b + lanes
        seqs = sequence(others, batch, num_seqs, num_tokens, max_keys)
        count, alike = _tiles_from(seqs, keys, plan)
        _, more = _tiles_from(seqs, keys + plan.block_n, plan)
        before = tl.where(others < number, alike, more)
        counted = tl.reduce((before, count), 0, add2)
        place, total = place + counted[0], total + counted[1]
    count, _ = _tiles_from(seq, keys, plan)
    _, more = _tiles_from(seq, keys + plan.block_n, plan)
    place += count - 1 - more - mine  # the last of a sequence sees most
    if (mine >= 0) & (mine < count) & (place >= 0) & (place < room):
        row = tiles + place * FIELDS
        tl.store(row, number)
        tl.store(row + 1, seq.start)
        tl.store(row + 2, seq.count)
        tl.store(row + 3, seq.length)
        tl.store(row + 4, mine * plan.block_q)
    if tile == 0:
        tl.store(tiles + room * FIELDS, tl.minimum(total, room))
