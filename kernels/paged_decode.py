"""Decoding: softmax(scale * q k^T + mask) v for sequences of few new tokens.

Workers take equal runs of the tiles of keys of all sequences (Stream-K; Osama et al., 2023). A
second kernel merges their partial results, and clears the rows that see no key. Shape letters as in
`paged_attention`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from torch_tkv.kernels.attention_geometry import (
    SIZES,
    Sequence,
    query_rows,
    query_tiles,
    sequence,
    tiles_of,
)
from torch_tkv.kernels.attention_result import Result, finish, store_result
from torch_tkv.kernels.attention_tiles import Inputs, attend_tile

# Note [Work of the decoding workers]
# The tiles of keys that decoding reads, sequence after sequence and tile of queries after tile of
# queries, form one list. Of its `total` tiles every worker takes an equal run; where a run begins,
# and whose run a tile is in, follow from `total` and the number of workers. The list is known on
# the device alone, from seq_lens and query_start_loc, so the grid depends on shapes only.
#
# A worker shares at most two tiles of queries with others: the one that its run begins within, slot
# `worker` of the partial results, and the one that its run ends within, slot `workers + worker`. A
# shared tile of queries is merged in the order of the workers: the result does not depend on who
# was first. A worker begins one such tile at most, so there are no more of them than of workers.
#
# To begin with other queries drains the pipeline of loads, which costs about as much as two tiles
# of keys (H200, 2026-11-20): every tile of queries is charged for it, unless there are few tiles.


class Work(NamedTuple):
    """The list of tiles of keys, and how it is dealt out."""

    seqs: Any  # all sequences, [block_b]
    tiles: Any  # [block_b], of each sequence's part
    ends: Any  # [block_b]
    units: Any  # [block_b], tiles of queries of each sequence
    charge: Any  # what a tile of queries counts for beside its tiles of keys
    total: Any
    workers: Any  # that have a run


class Unit(NamedTuple):
    """A tile of queries as a part of the list of work."""

    seq: Any
    number: Any  # of the sequence
    query_tile: Any  # of the sequence
    lo: Any  # first tile of keys
    begin: Any  # in the list
    end: Any


@triton.jit
def _key_tiles(seq, plan: tl.constexpr):
    """Return the first tile of keys that some query sees, and the tile after the last."""
    lo = tl.zeros_like(seq.length)
    if plan.window is not None:
        lo = tl.maximum(seq.length - seq.count + 1 - plan.window, 0) // plan.block_n
    return lo, tiles_of(seq.length, plan)


@triton.jit
def _list_work(batch, num_seqs, num_tokens, max_keys, plan: tl.constexpr):
    seqs = sequence(tl.arange(0, plan.block_b), batch, num_seqs, num_tokens, max_keys)
    lo, hi = _key_tiles(seqs, plan)
    units = tl.where(seqs.length > 0, query_tiles(seqs.count, plan), 0)
    if plan.max_queries is not None:
        units = tl.where(seqs.count <= plan.max_queries, units, 0)
    num_units, num_tiles = tl.sum(units), tl.sum(units * (hi - lo))
    charge = tl.where(num_tiles > 4 * plan.workers, 2, 0)
    tiles = units * (hi - lo + charge)
    total = num_tiles + num_units * charge
    enough = tl.minimum(tl.maximum(num_tiles // 4, 16), tl.maximum(total, 1))
    workers = tl.minimum(plan.workers, enough)
    return Work(seqs, tiles, tl.cumsum(tiles), units, charge, total, workers)


@triton.jit
def _run_of(worker, work):
    """Return the first tile of a worker's run and the tile after the last."""
    each, more = work.total // work.workers, work.total % work.workers
    begin = worker * each + tl.minimum(worker, more)
    end = begin + each + (worker < more).to(tl.int32)
    return begin, tl.where(worker < work.workers, end, begin)


@triton.jit
def _worker_of(tile, work):
    """Return the worker whose run a tile is in."""
    each, more = work.total // work.workers, work.total % work.workers
    longer = more * (each + 1)  # tiles in the runs of one more
    late = more + (tile - longer) // tl.maximum(each, 1)
    return tl.where(tile < longer, tile // (each + 1), late)


@triton.jit
def _unit_at(tile, work, plan: tl.constexpr):
    """Return the tile of queries that a tile of the list belongs to.

    Sums select what is known of the sequence: loading it again would take longer.
    """
    begins = work.ends - work.tiles
    this = ((begins <= tile) & (tile < work.ends)).to(tl.int32)
    number, begin = tl.sum(tl.arange(0, plan.block_b) * this), tl.sum(begins * this)
    seqs = work.seqs
    seq = Sequence(tl.sum(seqs.start * this), tl.sum(seqs.count * this), tl.sum(seqs.length * this))
    lo, hi = _key_tiles(seq, plan)
    size = tl.maximum(hi - lo + work.charge, 1)
    unit = (tile - begin) // size
    begin += unit * size
    return Unit(seq, number, unit, lo, begin, begin + size)


@triton.jit
def _begin_of(unit, work):
    """Return where a tile of queries, of those of all sequences, begins in the list; or -1."""
    before = tl.cumsum(work.units) - work.units
    this = ((before <= unit) & (unit < before + work.units)).to(tl.int32)
    size = work.tiles // tl.maximum(work.units, 1)
    begin = tl.sum((work.ends - work.tiles + (unit - before) * size) * this)
    return tl.where(tl.sum(this) > 0, begin, -1)


@triton.jit(do_not_specialize=SIZES)
def paged_decode(
    out,  # [T, Hq, Dv]
    lse_out,  # None or [T, Hq]
    partial,  # [2 * workers, Hkv, tile_rows, Dv] float32, and behind it their log-sums
    query,  # [T, Hq, D]
    query_stride_t,
    query_stride_h,
    keys,
    values,
    batch,
    extra,
    scale,
    output_scale,  # None or []
    num_seqs,  # B
    num_tokens,  # T
    num_blocks,  # N
    max_blocks,
    SATURATES: tl.constexpr,
    plan: tl.constexpr,
):
    if plan.pdl:
        tl.extra.cuda.gdc_launch_dependents()
    kv_head, worker, kv_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    num_heads = kv_heads * plan.group
    max_keys = max_blocks * plan.page
    strides = (query_stride_t, query_stride_h)
    inputs = Inputs(query, *strides, keys, values, batch, extra, scale, num_blocks)
    result = Result(out, lse_out, values, extra.sinks, output_scale, num_heads)
    work = _list_work(batch, num_seqs, num_tokens, max_keys, plan)
    tile, end = _run_of(worker, work)
    while tile < end:
        unit = _unit_at(tile, work, plan)
        stop = tl.minimum(end, unit.end)
        # What a tile of queries is charged for comes first in its part of the list.
        lo = unit.lo + tl.maximum(tile - unit.begin - work.charge, 0)
        hi = unit.lo + tl.maximum(stop - unit.begin - work.charge, 0)
        rows, highest, total, acc = attend_tile(
            inputs, unit.seq, unit.number, unit.query_tile, lo, hi, kv_head, False, plan
        )
        dim = tl.arange(0, plan.block_dv)[None, :]
        if (tile == unit.begin) & (stop == unit.end):
            store_result(
                result,
                acc,
                highest[:, None],
                total[:, None],
                rows.token[:, None],
                rows.head[:, None],
                dim,
                rows.inside[:, None],
                kv_head,
                SATURATES,
                plan,
            )
        else:
            slot = tl.where(tile == unit.begin, plan.workers + worker, worker)
            m = tl.arange(0, plan.block_m)[:, None]
            stored = rows.inside[:, None]
            mean, lse = finish(acc, highest[:, None], total[:, None], None)
            row = (slot * kv_heads + kv_head) * plan.tile_rows + m
            inside = stored & (dim < plan.value_size)
            tl.store(partial + row * plan.value_size + dim, mean, mask=inside)
            partial_lse = partial + 2 * plan.workers * kv_heads * plan.tile_rows * plan.value_size
            tl.store(partial_lse + row, lse, mask=stored)
        tile = stop


@triton.jit
def _clear_rows(out, lse_out, batch, num_seqs, num_tokens, max_keys, num_heads, plan: tl.constexpr):
    """Write zeros where there is no key: rows of empty sequences, and padded rows."""
    seq = sequence(tl.arange(0, plan.block_b), batch, num_seqs, num_tokens, max_keys)
    live = seq.length > 0
    empty = tl.min(tl.where(live | (seq.count == 0), num_tokens, seq.start))
    padded = sequence(num_seqs, batch, num_seqs, num_tokens, max_keys).start
    columns = num_heads * plan.value_size
    BLOCK: tl.constexpr = 1024
    first = tl.minimum(empty, padded) + tl.program_id(1)
    for token in range(first, num_tokens, tl.num_programs(1)):
        owned = live & (seq.start <= token) & (token < seq.start + seq.count)
        if tl.sum(owned.to(tl.int32)) == 0:
            row = tl.cast(token, tl.int64) * num_heads
            for column in range(tl.program_id(0) * BLOCK, columns, tl.num_programs(0) * BLOCK):
                c = column + tl.arange(0, BLOCK)
                zeros = tl.zeros([BLOCK], out.dtype.element_ty)
                tl.store(out + row * plan.value_size + c, zeros, mask=c < columns)
                if lse_out is not None:
                    nothing = tl.full([BLOCK], float("-inf"), tl.float32)
                    tl.store(lse_out + row + c, nothing, mask=c < num_heads)


FEW = tl.constexpr(4)  # partial results: most tiles of queries have no more


@triton.jit
def _merged(
    partial, m, inside, kv_head, kv_heads, first, last, AHEAD: tl.constexpr, plan: tl.constexpr
):
    """Merge rows `m` [M, 1] of the partial results of the workers `first` to `last`.

    Returns the weighted sum [M, block_dv], the highest score and the sum of the weights [M, 1].
    """
    partial_lse = partial + 2 * plan.workers * kv_heads * plan.tile_rows * plan.value_size
    dim = tl.arange(0, plan.block_dv)[None, :]
    highest = tl.full(m.shape, float("-inf"), tl.float32)
    total = tl.full(m.shape, 0.0, tl.float32)
    acc = tl.full([m.shape[0], plan.block_dv], 0.0, tl.float32)
    for worker in range(first, last + 1, AHEAD):
        lses, means, top = (), (), highest
        for i in tl.static_range(AHEAD):
            other = worker + i
            slot = tl.where(other == first, plan.workers + first, other)
            row = (slot * kv_heads + kv_head) * plan.tile_rows + m
            mask = inside & (other + tl.zeros_like(m) <= last)
            lse = tl.load(partial_lse + row, mask=mask, other=float("-inf"))
            mask = mask & (dim < plan.value_size)
            mean = tl.load(partial + row * plan.value_size + dim, mask=mask, other=0.0)
            lses = lses + (lse,)  # type: ignore[assignment]  # noqa: RUF005, Triton has no stars
            means = means + (mean,)  # type: ignore[assignment]  # noqa: RUF005
            top = tl.maximum(top, lse)
        shift = tl.where(top == float("-inf"), 0.0, top)
        rescale = tl.exp2(highest - shift)
        total, acc, highest = total * rescale, acc * rescale, top
        for i in tl.static_range(AHEAD):
            weight = tl.exp2(lses[i] - shift)
            total += weight
            acc += weight * means[i]
    return acc, highest, total


@triton.jit(do_not_specialize=SIZES)
def paged_merge(
    out,  # [T, Hq, Dv]
    lse_out,  # None or [T, Hq]
    partial,  # [2 * workers, Hkv, tile_rows, Dv] float32, and behind it their log-sums
    values,
    batch,
    sinks,
    output_scale,  # None or []
    num_seqs,  # B
    num_tokens,  # T
    max_blocks,
    kv_heads,
    SATURATES: tl.constexpr,
    BY_UNIT: tl.constexpr,  # there is a program to each tile of queries, not to each worker
    ROWS: tl.constexpr,  # of a tile of queries, to a program
    AHEAD: tl.constexpr,  # partial results that are loaded at once, if there are more than FEW
    plan: tl.constexpr,
):
    """Merge the tile of queries that a worker began and others went on with; clear rows."""
    if plan.pdl and plan.max_queries is not None:
        tl.extra.cuda.gdc_launch_dependents()  # the prefilling part
    kv_head, worker = tl.program_id(0) % kv_heads, tl.program_id(1)
    num_heads = kv_heads * plan.group
    max_keys = max_blocks * plan.page
    _clear_rows(out, lse_out, batch, num_seqs, num_tokens, max_keys, num_heads, plan)
    work = _list_work(batch, num_seqs, num_tokens, max_keys, plan)
    if BY_UNIT:
        tile = _begin_of(tl.program_id(1), work)
        worker = _worker_of(tile, work)
        begin, end = _run_of(worker, work)
    else:
        begin, end = _run_of(worker, work)
        tile = end - 1
    unit = _unit_at(tile, work, plan)
    first_row = tl.program_id(0) // kv_heads * ROWS
    shared = (unit.begin >= begin) & (unit.end > end) & (end > begin) & (tile >= 0)
    shared = shared & query_rows(first_row, unit.seq, unit.query_tile, kv_head, plan).inside
    # Who has nothing to merge makes room, but for one: this kernel must not end before the other.
    if (not shared) & (tl.program_id(0) + tl.program_id(1) > 0):
        return
    last = tl.where(shared, _worker_of(unit.end - 1, work), -1)
    m = first_row + tl.arange(0, ROWS)[:, None]
    rows = query_rows(m, unit.seq, unit.query_tile, kv_head, plan)
    # A tile of it, because Triton 3.9's interpreter takes no scalars in masks.
    inside = (tl.zeros_like(m) + shared != 0) & rows.inside
    if plan.pdl:
        tl.extra.cuda.gdc_wait()
    results = (partial, m, inside, kv_head, kv_heads, worker, last)
    if AHEAD <= FEW:
        acc, highest, total = _merged(*results, AHEAD, plan)
    elif last - worker < FEW:
        acc, highest, total = _merged(*results, FEW, plan)
    else:
        acc, highest, total = _merged(*results, AHEAD, plan)
    store_result(
        Result(out, lse_out, values, sinks, output_scale, num_heads),
        acc,
        highest,
        total,
        rows.token,
        rows.head,
        tl.arange(0, plan.block_dv)[None, :],
        inside,
        kv_head,
        SATURATES,
        plan,
    )
