"""Attention of ragged queries over a paged cache: softmax(scale * q k^T + mask) v.

T query tokens of B sequences, Hq query heads in groups of G = Hq / Hkv to a KV head, head sizes D
(key) and Dv (value), N blocks of P slots. The G heads of a group are packed into the rows of a tile
of queries, so that K and V are read once a group.

Sequences of few new tokens are decoded: their tiles of keys are dealt out evenly to workers
(Stream-K; Osama et al., 2023), whose partial results a second kernel merges. Longer ones are
prefilled: a program takes a tile of queries to all its keys.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_tkv.kernels.attention_tiles import (
    Batch,
    Blocks,
    Cache,
    Modifiers,
    Options,
    Plan,
    Sequence,
    attend,
    finish,
    load_blocks,
    load_query,
    query_rows,
    scale_of_head,
    sequence,
    sequence_of,
    store_result,
    tiles_of,
    to_half,
    walk_of,
)
from torch_tkv.kernels.cache_tiles import SATURATES_AT
from torch_tkv.kernels.device import Device, device_of
from torch_tkv.kernels.launcher import Launch

# Note [Work of the decoding workers]
# The tiles of keys that decoding reads, sequence after sequence and tile of queries after tile of
# queries, form one list. Of its `total` tiles every worker takes an equal run; where a run begins,
# and whose run a tile is in, follow from `total` and the number of workers. The list is known on
# the device alone, from seq_lens and query_start_loc, so the grid depends on shapes only.
#
# A worker shares at most two tiles of queries with others: the one that its run begins within, slot
# `worker` of the partial results, and the one that its run ends within, slot `workers + worker`.
# Whoever begins a shared tile of queries also merges it, in the order of the workers: the result
# does not depend on who was first.
#
# To begin with other queries drains the pipeline of loads, which costs about as much as two tiles
# of keys (H200, 2026-11-20): every tile of queries is charged for it, unless there are few tiles.


class Work(NamedTuple):
    """The list of tiles of keys, and how it is dealt out."""

    seqs: Any  # all sequences, [block_b]
    tiles: Any  # [block_b], of each sequence's part
    ends: Any  # [block_b]
    charge: Any  # what a tile of queries counts for beside its tiles of keys
    total: Any
    workers: Any  # that have a run


class Unit(NamedTuple):
    """A tile of queries as a part of the list of work."""

    seq: Any
    number: Any  # of the sequence
    first: Any  # of its tokens, in the sequence
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
    units = tl.where(seqs.length > 0, (seqs.count + plan.block_q - 1) // plan.block_q, 0)
    if plan.max_queries is not None:
        units = tl.where(seqs.count <= plan.max_queries, units, 0)
    num_units, num_tiles = tl.reduce((units, units * (hi - lo)), 0, _add2)
    charge = tl.where(num_tiles > 4 * plan.workers, 2, 0)
    tiles = units * (hi - lo + charge)
    total = num_tiles + num_units * charge
    enough = tl.minimum(tl.maximum(num_tiles // 4, 16), tl.maximum(total, 1))
    return Work(seqs, tiles, tl.cumsum(tiles), charge, total, tl.minimum(plan.workers, enough))


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
def _add2(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add5(a, b, c, d, e, f, g, h, i, j):
    return a + f, b + g, c + h, d + i, e + j


@triton.jit
def _unit_at(tile, work, plan: tl.constexpr):
    """Return the tile of queries that a tile of the list belongs to.

    One reduction selects all that is known of the sequence: loading it again would take longer.
    """
    begins = work.ends - work.tiles
    this = ((begins <= tile) & (tile < work.ends)).to(tl.int32)
    number = tl.arange(0, plan.block_b) * this
    seqs = work.seqs
    picked = (number, begins * this, seqs.start * this, seqs.count * this, seqs.length * this)
    number, begin, start, count, length = tl.reduce(picked, 0, _add5)
    seq = Sequence(start, count, length)
    lo, hi = _key_tiles(seq, plan)
    size = tl.maximum(hi - lo + work.charge, 1)
    unit = (tile - begin) // size
    begin += unit * size
    return Unit(seq, number, unit * plan.block_q, lo, begin, begin + size)


@triton.jit
def _attend_tile(
    seq,
    number,
    first,
    lo,
    hi,
    kv_head,
    query,
    stride_t,
    stride_h,
    keys,
    values,
    batch,
    extra,
    scale,
    num_blocks,
    TO_THE_END: tl.constexpr,
    plan: tl.constexpr,
):
    """Return the rows of a tile of queries, and the state of their softmax.

    The tiles of keys are `lo : hi` or, TO_THE_END, those that some query of the tile sees.
    """
    walk = walk_of(seq, first, plan)
    if TO_THE_END:
        lo, hi = walk.lo, walk.hi
    table = batch.block_table + number.to(tl.int64) * batch.table_stride_b
    blocks = Blocks(table, batch.table_stride_n, num_blocks, walk.begin, walk.end)
    block = load_blocks(blocks, lo, plan)  # before the query, which is waited for

    rows = query_rows(tl.arange(0, plan.block_m), seq, first, kv_head, plan)
    q = load_query(query, rows, stride_t, stride_h, plan)
    factor = tl.full([plan.block_m], 1.0, tl.float32) * (scale * scale_of_head(keys, kv_head))
    if keys.data.dtype.element_ty.primitive_bitwidth == 8 and q.dtype == tl.bfloat16:
        q, power = to_half(q)
        factor *= power
    slope, bias = None, None
    if extra.slopes is not None:
        slope = tl.load(extra.slopes + rows.head, mask=rows.inside, other=0.0)
    if extra.bias is not None:
        bias = extra.bias + rows.token.to(tl.int64) * extra.bias_stride_t
    first_new = seq.length - seq.count
    modifiers = Modifiers(slope, bias, extra.bias_stride_q, extra.bias_width, first_new)

    highest = tl.full([plan.block_m], float("-inf"), tl.float32)
    total = tl.full([plan.block_m], 0.0, tl.float32)
    if plan.pairs is None:
        acc = (tl.full([plan.block_m, plan.block_dv], 0.0, tl.float32),)
    else:
        half = tl.full([plan.block_m, plan.block_dv // 2], 0.0, tl.float32)
        acc = (half, half)  # type: ignore[assignment]
    state = (highest, total, acc, block)
    tile = (q, factor, rows)
    cache = (keys, values, blocks, kv_head, modifiers)
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


_SIZES = ["num_seqs", "num_tokens", "num_blocks", "max_blocks"]


@triton.jit(do_not_specialize=_SIZES)
def _decode(
    out,  # [T, Hq, Dv]
    lse_out,  # None or [T, Hq]
    partial,  # [2 * workers, Hkv, block_q * G, Dv] float32, and behind it their log-sums
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
    TILE_ROWS: tl.constexpr = plan.block_q * plan.group
    work = _list_work(batch, num_seqs, num_tokens, max_keys, plan)
    tile, end = _run_of(worker, work)
    while tile < end:
        unit = _unit_at(tile, work, plan)
        stop = tl.minimum(end, unit.end)
        # What a tile of queries is charged for comes first in its part of the list.
        lo = unit.lo + tl.maximum(tile - unit.begin - work.charge, 0)
        hi = unit.lo + tl.maximum(stop - unit.begin - work.charge, 0)
        rows, highest, total, acc = _attend_tile(
            unit.seq,
            unit.number,
            unit.first,
            lo,
            hi,
            kv_head,
            query,
            query_stride_t,
            query_stride_h,
            keys,
            values,
            batch,
            extra,
            scale,
            num_blocks,
            False,
            plan,
        )
        dim = tl.arange(0, plan.block_dv)[None, :]
        if (tile == unit.begin) & (stop == unit.end):
            store_result(
                out,
                lse_out,
                acc,
                highest[:, None],
                total[:, None],
                rows.token[:, None],
                rows.head[:, None],
                dim,
                rows.inside[:, None],
                num_heads,
                kv_head,
                values,
                extra.sinks,
                output_scale,
                SATURATES,
                plan,
            )
        else:
            slot = tl.where(tile == unit.begin, plan.workers + worker, worker)
            m = tl.arange(0, plan.block_m)[:, None]
            stored = rows.inside[:, None]
            mean, lse = finish(acc, highest[:, None], total[:, None], None)
            row = (slot * kv_heads + kv_head) * TILE_ROWS + m
            inside = stored & (dim < plan.value_size)
            tl.store(partial + row * plan.value_size + dim, mean, mask=inside)
            partial_lse = partial + 2 * plan.workers * kv_heads * TILE_ROWS * plan.value_size
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
    for token in range(tl.minimum(empty, padded) + tl.program_id(1), num_tokens, plan.workers):
        owned = live & (seq.start <= token) & (token < seq.start + seq.count)
        if tl.sum(owned.to(tl.int32)) == 0:
            row = tl.cast(token, tl.int64) * num_heads
            for first in range(tl.program_id(0) * BLOCK, columns, tl.num_programs(0) * BLOCK):
                c = first + tl.arange(0, BLOCK)
                zeros = tl.zeros([BLOCK], out.dtype.element_ty)
                tl.store(out + row * plan.value_size + c, zeros, mask=c < columns)
                if lse_out is not None:
                    nothing = tl.full([BLOCK], float("-inf"), tl.float32)
                    tl.store(lse_out + row + c, nothing, mask=c < num_heads)


@triton.jit(do_not_specialize=_SIZES)
def _merge(
    out,  # [T, Hq, Dv]
    lse_out,  # None or [T, Hq]
    partial,  # [2 * workers, Hkv, block_q * G, Dv] float32, and behind it their log-sums
    values,
    batch,
    sinks,
    output_scale,  # None or []
    num_seqs,  # B
    num_tokens,  # T
    max_blocks,
    kv_heads,
    SATURATES: tl.constexpr,
    ROWS: tl.constexpr,  # of a tile of queries, to a program
    AHEAD: tl.constexpr,  # partial results that are loaded at once
    plan: tl.constexpr,
):
    """Merge the tile of queries that a worker began and others went on with; clear rows."""
    kv_head, worker = tl.program_id(0) % kv_heads, tl.program_id(1)
    num_heads = kv_heads * plan.group
    max_keys = max_blocks * plan.page
    _clear_rows(out, lse_out, batch, num_seqs, num_tokens, max_keys, num_heads, plan)
    work = _list_work(batch, num_seqs, num_tokens, max_keys, plan)
    begin, end = _run_of(worker, work)
    unit = _unit_at(end - 1, work, plan)
    shared = (unit.begin >= begin) & (unit.end > end) & (end > begin)
    last = tl.where(shared, _worker_of(unit.end - 1, work), -1)
    TILE_ROWS: tl.constexpr = plan.block_q * plan.group
    partial_lse = partial + 2 * plan.workers * kv_heads * TILE_ROWS * plan.value_size
    m = tl.program_id(0) // kv_heads * ROWS + tl.arange(0, ROWS)[:, None]
    dim = tl.arange(0, plan.block_dv)[None, :]
    token = unit.first + m // plan.group
    inside = shared & (m < TILE_ROWS) & (token < unit.seq.count)
    highest = tl.full([ROWS, 1], float("-inf"), tl.float32)
    total = tl.full([ROWS, 1], 0.0, tl.float32)
    acc = tl.full([ROWS, plan.block_dv], 0.0, tl.float32)
    if plan.pdl:
        tl.extra.cuda.gdc_wait()
    for first in range(worker, last + 1, AHEAD):
        lses, means, top = (), (), highest
        for i in tl.static_range(AHEAD):
            other = first + i
            slot = tl.where(other == worker, plan.workers + worker, other)
            row = (slot * kv_heads + kv_head) * TILE_ROWS + m
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
    store_result(
        out,
        lse_out,
        acc,
        highest,
        total,
        unit.seq.start + token,
        kv_head * plan.group + m % plan.group,
        dim,
        inside,
        num_heads,
        kv_head,
        values,
        sinks,
        output_scale,
        SATURATES,
        plan,
    )


@triton.jit(do_not_specialize=_SIZES)
def _prefill(
    out,  # [T, Hq, Dv]
    lse_out,  # None or [T, Hq]
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
    kv_head = tl.program_id(0)
    # The last tiles of a long sequence see the most keys: they come first.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    lanes, max_keys = tl.arange(0, plan.block_b), max_blocks * plan.page
    number, seq = sequence_of(tile, lanes, batch, num_seqs, num_tokens, max_keys, plan)
    first = (tile - (seq.start // plan.block_q + number)) * plan.block_q
    if (first >= seq.count) | (first < 0):
        return
    if plan.max_queries is not None:  # noqa: SIM102, the decoding part has the rest
        if (seq.count <= plan.max_queries) | (seq.length == 0):
            return
    rows, highest, total, acc = _attend_tile(
        seq,
        number,
        first,
        0,
        0,
        kv_head,
        query,
        query_stride_t,
        query_stride_h,
        keys,
        values,
        batch,
        extra,
        scale,
        num_blocks,
        True,
        plan,
    )
    store_result(
        out,
        lse_out,
        acc,
        highest[:, None],
        total[:, None],
        rows.token[:, None],
        rows.head[:, None],
        tl.arange(0, plan.block_dv)[None, :],
        rows.inside[:, None],
        tl.num_programs(0) * plan.group,
        kv_head,
        values,
        extra.sinks,
        output_scale,
        SATURATES,
        plan,
    )


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


def plan_decode(
    base: Plan, device: Device, *, tokens: int, seqs: int, kv_heads: int, bits: int, max_keys: int
) -> Config:
    """Plan the decoding of `tokens` queries, whose keys take `bits` bits an element.

    `max_keys` is what the block table has room for in a sequence. Tiles of keys of 16 KiB and two
    programs a processor were the best found on one H200 (Triton 3.6, 2026-11-21; 32 sequences of
    4096 keys, 8 heads x 128): bfloat16 133 us, with tiles of half the size 155, with twice as large
    ones 160; float8 77, 90 and 81. More programs than fit at once cost a fifth.
    """
    _, prefill = parts(tokens, seqs)
    rows = 1 if prefill else triton.cdiv(tokens, max(seqs, 1)) * base.group
    block_m = min(max(triton.next_power_of_2(rows), 16), 64)
    block_m = max(block_m, triton.next_power_of_2(base.group))
    row_bytes = max(base.block_d, base.block_dv) * bits // 8
    block_n = min(max(16384 // row_bytes, 16), 128)
    block_q = block_m // base.group
    tiles = min(tokens // block_q + seqs, tokens) * triton.cdiv(max_keys, block_n)
    workers = min(2 * device.processors // kv_heads, max(tiles // 4, 16))
    plan = base._replace(
        block_q=block_q,
        block_m=block_m,
        block_n=block_n,
        block_b=max(triton.next_power_of_2(seqs), 16),
        workers=max(workers, 1),
        max_queries=MAX_DECODED if prefill else None,
        pdl=device.arch >= 90,
    )
    return Config(plan, 4, 3 if device.arch else 2)


def plan_prefill(
    base: Plan, device: Device, *, tokens: int, seqs: int, bits: int, hopper: bool = False
) -> Config:
    """Plan the prefilling of `tokens` queries; the wider of query and cache has `bits` bits."""
    decode, _ = parts(tokens, seqs)
    row_bytes = max(base.block_d, base.block_dv) * bits // 8
    # Tiles must fit the shared memory: 99 KiB on sm_86 and sm_89, 64 KiB on gfx942.
    large = device.arch in (80, 90, 100, 103) and bits == 16
    block_m = 128 if large or hopper else 64 if row_bytes <= 256 else 32
    block_m = max(block_m, triton.next_power_of_2(base.group))
    plan = base._replace(
        block_q=block_m // base.group,
        block_m=block_m,
        block_n=128 if hopper else min(max(16384 // row_bytes, 16), 64),
        block_b=min(triton.next_power_of_2(seqs + 1), 1024),
        max_queries=MAX_DECODED if decode else None,
        pairs=None,
    )
    return Config(plan, 8 if large and not hopper else 4, 3 if large else 2)


def prepare(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_scale_cache: Tensor | None = None,
    v_scale_cache: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    query_bias: Tensor | None = None,
    output_scale: Tensor | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    with_lse: bool = False,
) -> Launch:
    """Describe the launches of attention; arguments as in `torch_tkv.paged_attention`."""
    tokens, heads, size = query.shape
    _, page, kv_heads, value_size = value_cache.shape
    device = device_of(query.device)
    base = Plan(
        page=page,
        group=heads // kv_heads,
        size=size,
        value_size=value_size,
        key_strides=key_cache.stride()[:3],
        value_strides=value_cache.stride()[:3],
        causal=causal,
        window=window,
        softcap=softcap,
        block_d=max(triton.next_power_of_2(size), 16),
        block_dv=max(triton.next_power_of_2(value_size), 16),
        pairs=_pairs(value_cache, query, device),
    )
    dtype = query.dtype if output_scale is None else torch.float8_e4m3fn
    out = query.new_empty(tokens, heads, value_size, dtype=dtype)
    lse = query.new_empty(tokens, heads, dtype=torch.float32) if with_lse else None
    bias_sizes = (0, 0, 0) if query_bias is None else (*query_bias.stride(), query_bias.shape[1])
    attention = _Attention(
        out,
        lse,
        query,
        _cache(key_cache, k_scale, k_scale_cache),
        _cache(value_cache, v_scale, v_scale_cache),
        Batch(
            block_table,
            block_table.stride(0),
            block_table.stride(1),
            seq_lens,
            seq_lens.stride(0),
            query_start_loc,
            query_start_loc.stride(0),
        ),
        Options(alibi_slopes, sinks, query_bias, *bias_sizes),
        scale,
        output_scale,
    )
    decode, prefill = parts(tokens, seq_lens.shape[0])
    launch = attention.prefill(base, device) if prefill else None
    if decode:
        launch = attention.decode(base, device, launch)
    assert launch is not None
    return launch._replace(out=out if lse is None else (out, lse))


class _Attention(NamedTuple):
    """The arguments of a call, as the kernels take them."""

    out: Tensor
    lse: Tensor | None
    query: Tensor
    keys: Cache
    values: Cache
    batch: Batch
    extra: Options
    scale: float
    output_scale: Tensor | None

    @property
    def sizes(self) -> dict[str, int]:
        return {"tokens": self.query.shape[0], "seqs": self.batch.block_table.shape[0]}

    @property
    def tensors(self) -> tuple[Any, ...]:
        """The arguments that both kernels of attention take, behind `out`, `lse` and scratch."""
        strides = self.query.stride()[:2]
        caches = (self.keys, self.values)
        rest = (self.batch, self.extra, self.scale, self.output_scale)
        return (self.query, *strides, *caches, *rest)

    @property
    def limits(self) -> tuple[int, int, int, int]:
        seqs, max_blocks = self.batch.block_table.shape
        return (seqs, self.query.shape[0], self.keys.data.shape[0], max_blocks)

    @property
    def saturates(self) -> float | None:
        return SATURATES_AT.get(self.out.dtype)

    def prefill(self, base: Plan, device: Device) -> Launch:
        hopper = self._hopper(base, device)
        bits = 8 * max(self.query.element_size(), self.keys.data.element_size())
        config = plan_prefill(base, device, **self.sizes, bits=bits, hopper=hopper is not None)
        plan, num_warps, num_stages = config
        tiles = self.query.shape[0] // plan.block_q + self.batch.block_table.shape[0] + 1
        caches = (self.keys.data, self.values.data)
        boxes = () if hopper is None else [hopper.boxes_of(cache, plan) for cache in caches]
        return Launch(
            _prefill if hopper is None else hopper.hopper_prefill,
            (self.keys.data.shape[2], tiles),
            (self.out, self.lse, *boxes, *self.tensors),
            self.limits,
            (self.saturates, plan),
            {"num_warps": num_warps, "num_stages": num_stages},
        )

    def _hopper(self, base: Plan, device: Device) -> ModuleType | None:
        """Return the module of the prefilling kernel for Hopper where it can do this."""
        caches = (self.keys.data, self.values.data)
        able = (
            device.arch == 90
            and triton.__version__.startswith(_GLUON_TRITONS)
            and base.size == base.value_size
            and base.size in (64, 128)
            and base.group <= 128
            and self.extra.slopes is None
            and self.extra.bias is None
            # A block is fetched in boxes of 8 rows or more, a power of 2, with aligned rows.
            and base.page in (8, 16, 32, 64, 128, 256)
            and all(
                cache.dtype == self.query.dtype and cache.element_size() == 2 for cache in caches
            )
            and all(cache.data_ptr() % 16 == 0 and min(cache.shape) > 0 for cache in caches)
            and all(stride % 8 == 0 for cache in caches for stride in cache.stride()[:3])
        )
        return importlib.import_module("torch_tkv.kernels.hopper_prefill") if able else None

    def decode(self, base: Plan, device: Device, then: Launch | None) -> Launch:
        kv_heads = self.keys.data.shape[2]
        bits = 32 if self.query.element_size() == 4 else 8 * self.keys.data.element_size()
        max_keys = self.batch.block_table.shape[1] * base.page
        plan, num_warps, num_stages = plan_decode(
            base, device, **self.sizes, kv_heads=kv_heads, bits=bits, max_keys=max_keys
        )
        rows = plan.block_q * plan.group
        numel = 2 * plan.workers * kv_heads * rows * (plan.value_size + 1)
        partial = self.query.new_empty(numel, dtype=torch.float32)
        pdl = {"launch_pdl": True} if plan.pdl else {}
        # Few sequences have many partial results each: a program then loads more at once. Tiles of
        # many rows may be of few (padded rows count as queries): these too take four programs.
        few = 4 * self.sizes["seqs"] <= plan.workers
        merged = 2 if few else max(triton.next_power_of_2(rows) // 4, 4)
        ahead, warps = max(32 // merged, 1), 2 if few else 4
        merge = Launch(
            _merge,
            (kv_heads * triton.cdiv(rows, merged), plan.workers),
            (
                self.out,
                self.lse,
                partial,
                self.values,
                self.batch,
                self.extra.sinks,
                self.output_scale,
            ),
            (*self.limits[:2], self.limits[3], kv_heads),
            (self.saturates, merged, ahead, plan),
            {"num_warps": warps} | pdl,
            then=then,
        )
        return Launch(
            _decode,
            (kv_heads, plan.workers),
            (self.out, self.lse, partial, *self.tensors),
            self.limits,
            (self.saturates, plan),
            {"num_warps": num_warps, "num_stages": num_stages},
            then=merge,
        )


# Gluon, in which the prefilling kernel for Hopper is written, is experimental.
_GLUON_TRITONS = ("3.6.", "3.7.", "3.8.", "3.9.")

_PAIRS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5"}


def _pairs(values: Tensor, query: Tensor, device: Device) -> str | None:
    """Return how values are read in pairs, None if they are not; see Note [Pairs of values]."""
    even = all(n % 2 == 0 for n in (*values.stride()[:3], values.shape[3], values.data_ptr()))
    if not even or device.arch < 80 or query.dtype == torch.float32:
        return None
    return _PAIRS.get(values.dtype)


def _cache(data: Tensor, scale: Tensor | None, scales: Tensor | None) -> Cache:
    scale_stride = scale.stride(0) if scale is not None and scale.dim() else 0
    strides = (0, 0, 0) if scales is None else scales.stride()
    return Cache(data, scale, scale_stride, scales, *strides)
