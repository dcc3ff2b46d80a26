"""Prefilling on Hopper: softmax(scale * q k^T + mask) v for tiles of queries, warp-specialised.

A program takes tiles of 128 rows of queries, 64 to each of two consumers of four warps. One more
warp, the producer, has the tensor memory accelerator (TMA) fetch the blocks of keys and of values
into a ring of shared memory, those of the next tile while the consumers end one. While one consumer
multiplies, the other takes its softmax: they take turns (FlashAttention-3; Shah et al., 2024).
Written in Gluon: Triton does not specialise these loops on sm_90.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.experimental.gluon.language as gl
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from torch_tkv.kernels.attention_geometry import (
    SIZES,
    Blocks,
    Plan,
    Sequence,
    query_rows,
    visible,
    walk_of,
)
from torch_tkv.kernels.attention_tiles import (
    LOG2E,
    Modifiers,
    Result,
    finish_rows,
    modify,
    softmax_step,
    store_rows,
)
from torch_tkv.kernels.tile_list import FIELDS

STAGES = gl.constexpr(2)
CONSUMERS = gl.constexpr(2)
ROWS = gl.constexpr(64)  # of a consumer
HALF = gl.constexpr(64)  # columns of 16 bits: what one box of the TMA may be wide
# The registers of a thread; the kernel is started with as many for all.
CONSUMER_REGISTERS = gl.constexpr(232)
PRODUCER_REGISTERS = gl.constexpr(40)


# Names that Gluon changed: in Triton 3.7 and in 3.9.
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_REINTERPRETS = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


class Ring(NamedTuple):
    """Stages of shared memory that the producer fills and the consumers empty."""

    k: Any  # [STAGES, block_n, D]
    v: Any
    k_boxes: Any  # the same memory, box by box
    v_boxes: Any
    k_full: Any  # barriers, [STAGES]
    k_free: Any
    v_full: Any
    v_free: Any


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
    """An entry of the list: a sequence and the first token of a tile of it; and a KV head."""

    number: Any
    start: Any
    count: Any
    length: Any
    first: Any
    kv_head: Any


class Tile(NamedTuple):
    """A tile of queries of one KV head."""

    seq: Any
    first: Any  # of its tokens, in the sequence
    kv_head: Any
    blocks: Any
    walk: Any


@gluon.jit
def _uniform(x):
    """Return a number that all threads of a warp share so that the compiler knows.

    What it does not know to be shared, it keeps in every thread: addresses of the ring made of it
    have to be moved to where the tensor cores want them, product by product.
    """
    shuffle: gl.constexpr = "shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;"
    return gl.inline_asm_elementwise(shuffle, "=r,r", [x], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _between(x, highest):
    return _uniform(gl.minimum(gl.maximum(x, 0), highest))


@gluon.jit
def _item_of(turn):
    """Return the place in the list of what this program takes at a turn."""
    program, programs = gl.program_id(0), gl.num_programs(0)
    return turn * programs + gl.where(turn % 2 == 0, program, programs - 1 - program)


@gluon.jit
def _num_turns(work):
    """Return how many tiles this program takes."""
    items = gl.load(work.tiles + work.num_tiles * FIELDS)
    items = _uniform(gl.minimum(gl.maximum(items, 0), work.num_tiles)) * work.kv_heads
    turns = items // gl.num_programs(0)
    return turns + (_item_of(turns) < items).to(gl.int32)


@gluon.jit
def _load_entry(turn, work):
    """Return the entry of the list that this program takes at a turn, the last one behind its end.

    It is loaded a turn ahead, and `_known` when it is needed.
    """
    item = gl.minimum(_item_of(turn), work.num_tiles * work.kv_heads - 1)
    row = work.tiles + item // work.kv_heads * FIELDS
    number, start, count = gl.load(row), gl.load(row + 1), gl.load(row + 2)
    length, first = gl.load(row + 3), gl.load(row + 4)
    return Entry(number, start, count, length, first, item % work.kv_heads)


@gluon.jit
def _known(entry, work):
    """Return an entry as what was listed, if the indices are what they should be; uniform."""
    number = _between(entry.number, work.num_seqs)
    start = _between(entry.start, work.num_tokens)
    count = _between(entry.count, work.num_tokens - start)
    length = _between(entry.length, gl.where(number < work.num_seqs, work.max_keys, 0))
    first = _between(entry.first, count)
    return Entry(number, start, count, length, first, entry.kv_head)


@gluon.jit
def _tile_of(entry, work, plan: gl.constexpr):
    """Return the tile of an entry of the list."""
    seq = Sequence(entry.start, entry.count, entry.length)
    walk = walk_of(seq, entry.first, plan)
    batch = work.batch
    table = batch.block_table + entry.number.to(gl.int64) * batch.table_stride_b
    blocks = Blocks(table, batch.table_stride_n, work.num_blocks, walk.begin, walk.end)
    return Tile(seq, entry.first, entry.kv_head, blocks, walk)


@gluon.jit
def _matrices(memory, COUNT: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Return shared memory as matrices that follow each other."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    if _REINTERPRETS:
        return memory.reinterpret(memory.dtype, [COUNT, ROWS, COLUMNS], LAYOUT)
    else:
        return memory._reinterpret(memory.dtype, [COUNT, ROWS, COLUMNS], LAYOUT)


@gluon.jit
def _produce(ring, key_boxes, value_boxes, work, plan: gl.constexpr):
    """Fetch the keys and values of all tiles; what is no block of the cache arrives as zeros."""
    SLOTS: gl.constexpr = min(plan.page, plan.block_n)
    BOXES: gl.constexpr = plan.block_n // SLOTS
    step = 0
    for turn in range(_num_turns(work)):
        queries = _tile_of(_known(_load_entry(turn, work), work), work, plan)
        blocks, walk = queries.blocks, queries.walk
        for tile in range(walk.lo, walk.hi):
            numbers = ()
            for box in gl.static_range(BOXES):
                position = tile * plan.block_n + box * SLOTS
                entry = blocks.row + (position // plan.page).to(gl.int64) * blocks.stride
                read = (position < blocks.end) & (position + SLOTS > blocks.begin)
                number = gl.load(entry, mask=read, other=-1)
                exists = (number >= 0) & (number < blocks.num_blocks)
                number = gl.where(exists, number, blocks.num_blocks).to(gl.int32)
                numbers = numbers + (number,)  # type: ignore[assignment]  # noqa: RUF005, no stars
            where = (numbers, tile, step, queries.kv_head)
            _fetch(key_boxes, ring.k_boxes, ring.k_free, ring.k_full, *where, plan)
            _fetch(value_boxes, ring.v_boxes, ring.v_free, ring.v_full, *where, plan)
            step += 1


@gluon.jit
def _fetch(boxes, memory, free, full, numbers, tile, step, kv_head, plan: gl.constexpr):
    """Fetch the blocks of a tile of keys, or of their values, once their stage is free."""
    SLOTS: gl.constexpr = min(plan.page, plan.block_n)
    BOXES: gl.constexpr = plan.block_n // SLOTS
    HALVES: gl.constexpr = plan.size // HALF
    stage = step % STAGES
    mbarrier.wait(free.index(stage), (step // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(stage), plan.block_n * plan.size * 2)
    for box in gl.static_range(BOXES):
        offset = (tile * plan.block_n + box * SLOTS) % plan.page
        for half in gl.static_range(HALVES):
            load_box(
                boxes,
                [numbers[box], kv_head, offset, half * HALF],
                full.index(stage),
                memory.index((stage * HALVES + half) * BOXES + box),
            )


@gluon.jit
def _start_scores(q, ring, step, plan: gl.constexpr):
    """Start to multiply queries with a tile of keys."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, plan.block_n, 16])
    zeros = gl.full([ROWS, plan.block_n], 0.0, gl.float32, layout=LAYOUT)
    k = ring.k.index(step % STAGES).permute((1, 0))
    return warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)


@gluon.jit
def _softmax(
    scores, state, tile, factor, scale, rows, blocks, MASKED: gl.constexpr, plan: gl.constexpr
):
    """Return the weights of a tile as an operand of the next product, and the new state."""
    highest, total = state
    LAYOUT: gl.constexpr = scores.type.layout
    columns = gl.arange(0, plan.block_n, layout=gl.SliceLayout(0, LAYOUT))
    key_position = (tile * plan.block_n + columns)[None, :]
    if plan.softcap is not None:
        nothing = Modifiers(None, None, None, None, None)
        scores = modify(scores * scale, key_position, rows.position[:, None], nothing, plan)
    if MASKED:
        seen = visible(key_position, rows.position[:, None], blocks.end, plan)
        scores = gl.where(seen, scores, float("-inf"))
    weights, rescale, highest, total = softmax_step(scores, factor, highest, total)
    return weights, rescale, highest, total


@gluon.jit
def _operand(weights, DTYPE: gl.constexpr, plan: gl.constexpr):
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, plan.size, 16])
    return gl.convert_layout(weights.to(DTYPE), gl.DotOperandLayout(0, LAYOUT, 2))


@gluon.jit
def _clear_unread(ring, step, tile, position, BEFORE: gl.constexpr, plan: gl.constexpr):
    """Zero the values from a key position on, or BEFORE it, in its block: 0 * NaN is NaN."""
    SLOTS: gl.constexpr = min(plan.page, plan.block_n)
    BOXES: gl.constexpr = plan.block_n // SLOTS
    HALVES: gl.constexpr = plan.size // HALF
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    slot = position - tile * plan.block_n
    if (slot < plan.block_n) & (slot % SLOTS != 0):
        row = gl.arange(0, SLOTS, layout=gl.SliceLayout(1, LAYOUT))[:, None]
        cleared = row < slot % SLOTS if BEFORE else row >= slot % SLOTS
        for half in gl.static_range(HALVES):
            box = ring.v_boxes.index(((step % STAGES) * HALVES + half) * BOXES + slot // SLOTS)
            box = _matrices(box, 1, SLOTS, HALF).index(0)
            box.store(gl.where(cleared, 0.0, box.load(LAYOUT)))
        fence_async_shared()
        barrier()


@gluon.jit
def _load_query(WHICH: gl.constexpr, query, tile, plan: gl.constexpr):
    """Return a consumer's rows of a tile of queries."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    m = WHICH * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    rows = query_rows(m, tile.seq, tile.first, tile.kv_head, plan)
    dim = gl.arange(0, plan.size, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    row = rows.token.to(gl.int64) * query[1] + rows.head.to(gl.int64) * query[2]
    return gl.load(query[0] + row[:, None] + dim, mask=rows.inside[:, None], other=0.0)


@gluon.jit
def _consume(
    WHICH: gl.constexpr,
    ring,
    turns,
    q_memory,
    query,  # pointer and strides of tokens and heads
    scale,
    work,
    result,
    SATURATES: gl.constexpr,
    plan: gl.constexpr,
):
    """Attend 64 rows of each tile of queries to all its tiles of keys."""
    q = q_memory.index(WHICH)
    done = 0
    following = _known(_load_entry(0, work), work)
    loaded = _load_query(WHICH, query, _tile_of(following, work, plan), plan)
    for turn in range(_num_turns(work)):
        # Of a tuple that nests others, Triton 3.6 carries some fields into the next turn, not all.
        tile = _tile_of(following, work, plan)
        q.store(loaded)
        fence_async_shared()
        barrier()
        ahead = _load_entry(turn + 1, work)
        acc, highest, total = _attend_tile(WHICH, ring, turns, q, scale, tile, done, plan)
        done += tile.walk.hi - tile.walk.lo
        following = _known(ahead, work)
        loaded = _load_query(WHICH, query, _tile_of(following, work, plan), plan)
        _store(WHICH, result, acc, highest, total, tile, SATURATES, plan)


@gluon.jit
def _store(
    WHICH: gl.constexpr,
    result,
    acc,
    highest,
    total,
    tile,
    SATURATES: gl.constexpr,
    plan: gl.constexpr,
):
    """Store a consumer's rows of a tile, whole rows of 16 bytes a thread."""
    RESULT: gl.constexpr = acc.type.layout
    m = WHICH * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, RESULT))
    rows = query_rows(m, tile.seq, tile.first, tile.kv_head, plan)
    x, lse = finish_rows(
        result,
        acc,
        gl.convert_layout(highest, gl.SliceLayout(1, RESULT))[:, None],
        gl.convert_layout(total, gl.SliceLayout(1, RESULT))[:, None],
        rows.head[:, None],
        rows.inside[:, None],
        tile.kv_head,
        SATURATES,
    )
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    m = WHICH * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, STORED))
    rows = query_rows(m, tile.seq, tile.first, tile.kv_head, plan)
    store_rows(
        result,
        gl.convert_layout(x, STORED),
        gl.convert_layout(lse, STORED),
        rows.token[:, None],
        rows.head[:, None],
        gl.arange(0, plan.size, layout=gl.SliceLayout(0, STORED))[None, :],
        rows.inside[:, None],
        plan,
    )


@gluon.jit
def _attend_tile(
    WHICH: gl.constexpr,
    ring,
    turns,
    q,
    scale,
    tile,
    done,  # tiles of keys before this tile of queries
    plan: gl.constexpr,
):
    """Return the sum of the weighted values, the highest score and the sum of the weights."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, plan.block_n, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, plan.size, 16])
    walk, blocks = tile.walk, tile.blocks
    m = WHICH * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    rows = query_rows(m, tile.seq, tile.first, tile.kv_head, plan)
    factor = gl.full([ROWS], LOG2E, gl.float32, layout=gl.SliceLayout(1, SCORES))
    if plan.softcap is None:
        factor *= scale
    highest = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
    total = gl.full([ROWS], 0.0, gl.float32, layout=gl.SliceLayout(1, SCORES))
    acc = gl.full([ROWS, plan.size], 0.0, gl.float32, layout=RESULT)
    steps = walk.hi - walk.lo
    if steps > 0:
        mbarrier.wait(ring.k_full.index(done % STAGES), done // STAGES & 1)
        mbarrier.wait(turns.index(WHICH), done & 1)
        scores = _start_scores(q, ring, done, plan)
        mbarrier.arrive(turns.index(1 - WHICH), count=1)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(ring.k_free.index(done % STAGES), count=1)
        weights, _, highest, total = _softmax(
            scores, (highest, total), walk.lo, factor, scale, rows, blocks, True, plan
        )
        weights = _operand(weights, q.dtype, plan)
        state = (weights, acc, highest, total)
        context = (ring, turns, q, done, walk.lo, factor, scale, rows, blocks)
        below = 1
        if plan.window is not None:  # the step after the first masks, too: see _step
            below = gl.minimum(gl.maximum(walk.masked_below - walk.lo, 2), steps)
            for step in range(1, below):
                state = _step(WHICH, state, step, *context, True, plan)
        above = gl.maximum(walk.masked_from - walk.lo, below)
        for step in range(below, above):
            state = _step(WHICH, state, step, *context, False, plan)
        for step in range(above, steps):
            state = _step(WHICH, state, step, *context, True, plan)
        weights, acc, highest, total = state
        last = done + steps - 1
        mbarrier.wait(ring.v_full.index(last % STAGES), last // STAGES & 1)
        _clear_unread(ring, last, walk.hi - 1, tile.seq.length, False, plan)
        if plan.window is not None:  # noqa: SIM102
            if steps == 1:
                _clear_unread(ring, last, walk.lo, blocks.begin, True, plan)
        acc = warpgroup_mma(weights, ring.v.index(last % STAGES), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(ring.v_free.index(last % STAGES), count=1)
    return acc, highest, total


@gluon.jit
def _step(
    WHICH: gl.constexpr,
    state,
    step,
    ring,
    turns,
    q,
    done,
    lo,
    factor,
    scale,
    rows,
    blocks,
    MASKED: gl.constexpr,
    plan: gl.constexpr,
):
    """Multiply a tile of keys, and with the weights of the tile before it that one's values."""
    weights, acc, highest, total = state
    now, before = done + step, done + step - 1
    mbarrier.wait(ring.k_full.index(now % STAGES), now // STAGES & 1)
    mbarrier.wait(turns.index(WHICH), now & 1)
    scores = _start_scores(q, ring, now, plan)
    mbarrier.wait(ring.v_full.index(before % STAGES), before // STAGES & 1)
    if MASKED and plan.window is not None:  # noqa: SIM102, one is known to the compiler
        if step == 1:
            _clear_unread(ring, before, lo, blocks.begin, True, plan)
    acc = warpgroup_mma(weights, ring.v.index(before % STAGES), acc, is_async=True)
    mbarrier.arrive(turns.index(1 - WHICH), count=1)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(ring.k_free.index(now % STAGES), count=1)
    new, rescale, highest, total = _softmax(
        scores, (highest, total), lo + step, factor, scale, rows, blocks, MASKED, plan
    )
    acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
    mbarrier.arrive(ring.v_free.index(before % STAGES), count=1)
    LAYOUT: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    acc = acc * gl.convert_layout(rescale, LAYOUT)[:, None]
    return _operand(new, weights.dtype, plan), acc, highest, total


@gluon.jit
def _barriers(COUNT: gl.constexpr):
    return gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())


@gluon.jit(do_not_specialize=[*SIZES, "kv_heads", "num_tiles"])
def hopper_prefill(
    out,  # [T, Hq, D]
    lse_out,  # None or [T, Hq]
    tiles,  # of list_tiles
    key_boxes,  # descriptors of the caches as [N, Hkv, P, D]
    value_boxes,
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
    kv_heads,
    num_tiles,
    SATURATES: gl.constexpr,
    plan: gl.constexpr,
):
    DTYPE: gl.constexpr = query.dtype.element_ty
    SLOTS: gl.constexpr = min(plan.page, plan.block_n)
    COUNT: gl.constexpr = STAGES * (plan.size // HALF) * (plan.block_n // SLOTS)
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    k_boxes = gl.allocate_shared_memory(DTYPE, [COUNT, 1, 1, SLOTS, HALF], key_boxes.layout)
    v_boxes = gl.allocate_shared_memory(DTYPE, [COUNT, 1, 1, SLOTS, HALF], key_boxes.layout)
    q_memory = gl.allocate_shared_memory(DTYPE, [CONSUMERS, ROWS, plan.size], TILE)
    BLOCK_N: gl.constexpr = plan.block_n
    SIZE: gl.constexpr = plan.size
    ring = Ring(
        _matrices(k_boxes, STAGES, BLOCK_N, SIZE),
        _matrices(v_boxes, STAGES, BLOCK_N, SIZE),
        k_boxes,
        v_boxes,
        _barriers(STAGES),
        _barriers(STAGES),
        _barriers(STAGES),
        _barriers(STAGES),
    )
    turns = _barriers(CONSUMERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(ring.k_full.index(i), count=1)
        mbarrier.init(ring.k_free.index(i), count=CONSUMERS)
        mbarrier.init(ring.v_full.index(i), count=1)
        mbarrier.init(ring.v_free.index(i), count=CONSUMERS)
    mbarrier.init(turns.index(0), count=1)
    mbarrier.init(turns.index(1), count=1)
    fence_async_shared()
    mbarrier.arrive(turns.index(0), count=1)
    rows = (query, query_stride_t, query_stride_h)
    sizes = (num_seqs, num_tokens, num_blocks, max_blocks * plan.page, kv_heads)
    work = Work(tiles, num_tiles, batch, *sizes)
    result = Result(out, lse_out, values, extra.sinks, output_scale, kv_heads * plan.group)
    if plan.pdl:
        tl.extra.cuda.gdc_wait()
    gl.warp_specialize(
        [
            (_consume, (0, ring, turns, q_memory, rows, scale, work, result, SATURATES, plan)),
            (_consume, (1, ring, turns, q_memory, rows, scale, work, result, SATURATES, plan)),
            (_produce, (ring, key_boxes, value_boxes, work, plan)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def boxes_of(cache: Tensor, plan: Plan) -> TensorDescriptor:
    """Return the descriptor by which the TMA fetches half rows of a block of `cache`."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    box = [1, 1, min(plan.page, plan.block_n), HALF.value]
    cache = cache.transpose(1, 2)
    return TensorDescriptor(cache, list(cache.shape), list(cache.stride()), box, layout)
