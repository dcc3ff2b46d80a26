"""Prefilling on Hopper: softmax(scale * q k^T + mask) v for tiles of queries, warp-specialised.

A program takes a tile of 128 rows of queries, 64 to each of two consumers of four warps. One more
warp, the producer, has the tensor memory accelerator (TMA) fetch the blocks of keys and of values
into a ring of shared memory. While one consumer multiplies, the other takes its softmax: they take
turns (FlashAttention-3; Shah et al., 2024). Written in Gluon: Triton does not specialise these
loops on sm_90.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.experimental.gluon.language as gl
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
    query_rows,
    sequence_of,
    visible,
    walk_of,
)
from torch_tkv.kernels.attention_tiles import (
    LOG2E,
    Modifiers,
    Result,
    modify,
    softmax_step,
    store_result,
)

STAGES = gl.constexpr(2)
CONSUMERS = gl.constexpr(2)
ROWS = gl.constexpr(64)  # of a consumer
HALF = gl.constexpr(64)  # columns of 16 bits: what one box of the TMA may be wide
# The registers of a consumer's thread; the kernel is started with as many for all.
CONSUMER_REGISTERS = gl.constexpr(232)


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


class Tile(NamedTuple):
    """A tile of queries."""

    seq: Any
    first: Any  # of its tokens, in the sequence
    kv_head: Any
    blocks: Any
    walk: Any


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
    blocks, walk = work.blocks, work.walk
    SLOTS: gl.constexpr = min(plan.page, plan.block_n)
    BOXES: gl.constexpr = plan.block_n // SLOTS
    for tile in range(walk.lo, walk.hi):
        stage = (tile - walk.lo) % STAGES
        phase = ((tile - walk.lo) // STAGES & 1) ^ 1
        numbers = ()
        for box in gl.static_range(BOXES):
            position = tile * plan.block_n + box * SLOTS
            entry = blocks.row + (position // plan.page).to(gl.int64) * blocks.stride
            read = (position < blocks.end) & (position + SLOTS > blocks.begin)
            number = gl.load(entry, mask=read, other=-1)
            exists = (number >= 0) & (number < blocks.num_blocks)
            number = gl.where(exists, number, blocks.num_blocks).to(gl.int32)
            numbers = numbers + (number,)  # type: ignore[assignment]  # noqa: RUF005, no stars
        where = (numbers, tile, stage, phase, work.kv_head)
        _fetch(key_boxes, ring.k_boxes, ring.k_free, ring.k_full, *where, plan)
        _fetch(value_boxes, ring.v_boxes, ring.v_free, ring.v_full, *where, plan)


@gluon.jit
def _fetch(boxes, memory, free, full, numbers, tile, stage, phase, kv_head, plan: gl.constexpr):
    """Fetch the blocks of a tile of keys, or of their values, once their stage is free."""
    SLOTS: gl.constexpr = min(plan.page, plan.block_n)
    BOXES: gl.constexpr = plan.block_n // SLOTS
    HALVES: gl.constexpr = plan.size // HALF
    mbarrier.wait(free.index(stage), phase)
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
    """Attend 64 rows of queries to all tiles of keys."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, plan.block_n, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, plan.size, 16])
    LOADED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    DTYPE: gl.constexpr = query[0].dtype.element_ty
    walk, blocks = work.walk, work.blocks

    m = WHICH * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LOADED))
    rows = query_rows(m, work.seq, work.first, work.kv_head, plan)
    dim = gl.arange(0, plan.size, layout=gl.SliceLayout(0, LOADED))[None, :]
    row = rows.token.to(gl.int64) * query[1] + rows.head.to(gl.int64) * query[2]
    q = q_memory.index(WHICH)
    q.store(gl.load(query[0] + row[:, None] + dim, mask=rows.inside[:, None], other=0.0))
    fence_async_shared()
    barrier()

    m = WHICH * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    rows = query_rows(m, work.seq, work.first, work.kv_head, plan)
    factor = gl.full([ROWS], LOG2E, gl.float32, layout=gl.SliceLayout(1, SCORES))
    if plan.softcap is None:
        factor *= scale
    highest = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
    total = gl.full([ROWS], 0.0, gl.float32, layout=gl.SliceLayout(1, SCORES))
    acc = gl.full([ROWS, plan.size], 0.0, gl.float32, layout=RESULT)
    steps = walk.hi - walk.lo
    if steps > 0:
        mbarrier.wait(ring.k_full.index(0), 0)
        mbarrier.wait(turns.index(WHICH), 0)
        scores = _start_scores(q, ring, 0, plan)
        mbarrier.arrive(turns.index(1 - WHICH), count=1)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(ring.k_free.index(0), count=1)
        weights, _, highest, total = _softmax(
            scores, (highest, total), walk.lo, factor, scale, rows, blocks, True, plan
        )
        weights = _operand(weights, DTYPE, plan)
        state = (weights, acc, highest, total)
        context = (ring, turns, q, walk.lo, factor, scale, rows, blocks)
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
        last = steps - 1
        mbarrier.wait(ring.v_full.index(last % STAGES), last // STAGES & 1)
        _clear_unread(ring, last, walk.hi - 1, work.seq.length, False, plan)
        if plan.window is not None:  # noqa: SIM102
            if steps == 1:
                _clear_unread(ring, 0, walk.lo, blocks.begin, True, plan)
        acc = warpgroup_mma(weights, ring.v.index(last % STAGES), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])

    m = WHICH * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, RESULT))
    rows = query_rows(m, work.seq, work.first, work.kv_head, plan)
    dim = gl.arange(0, plan.size, layout=gl.SliceLayout(0, RESULT))[None, :]
    store_result(
        result,
        acc,
        gl.convert_layout(highest, gl.SliceLayout(1, RESULT))[:, None],
        gl.convert_layout(total, gl.SliceLayout(1, RESULT))[:, None],
        rows.token[:, None],
        rows.head[:, None],
        dim,
        rows.inside[:, None],
        work.kv_head,
        SATURATES,
        plan,
    )


@gluon.jit
def _step(
    WHICH: gl.constexpr,
    state,
    step,
    ring,
    turns,
    q,
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
    before = step - 1
    mbarrier.wait(ring.k_full.index(step % STAGES), step // STAGES & 1)
    mbarrier.wait(turns.index(WHICH), step & 1)
    scores = _start_scores(q, ring, step, plan)
    mbarrier.wait(ring.v_full.index(before % STAGES), before // STAGES & 1)
    if MASKED and plan.window is not None:  # noqa: SIM102, one is known to the compiler
        if before == 0:
            _clear_unread(ring, 0, lo, blocks.begin, True, plan)
    acc = warpgroup_mma(weights, ring.v.index(before % STAGES), acc, is_async=True)
    mbarrier.arrive(turns.index(1 - WHICH), count=1)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(ring.k_free.index(step % STAGES), count=1)
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


@gluon.jit(do_not_specialize=SIZES)
def hopper_prefill(
    out,  # [T, Hq, D]
    lse_out,  # None or [T, Hq]
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
    SATURATES: gl.constexpr,
    plan: gl.constexpr,
):
    kv_head = gl.program_id(0)
    # The last tiles of a long sequence see the most keys: they come first.
    tile = gl.num_programs(1) - 1 - gl.program_id(1)
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    lanes, max_keys = gl.arange(0, plan.block_b, layout=LANES), max_blocks * plan.page
    number, seq = sequence_of(tile, lanes, batch, num_seqs, num_tokens, max_keys, plan)
    first = (tile - (seq.start // plan.block_q + number)) * plan.block_q
    if (first >= seq.count) | (first < 0):
        return
    if plan.max_queries is not None:  # noqa: SIM102, the decoding part has the rest
        if (seq.count <= plan.max_queries) | (seq.length == 0):
            return
    walk = walk_of(seq, first, plan)
    table = batch.block_table + number.to(gl.int64) * batch.table_stride_b
    blocks = Blocks(table, batch.table_stride_n, num_blocks, walk.begin, walk.end)

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
    tile = Tile(seq, first, kv_head, blocks, walk)
    num_heads = gl.num_programs(0) * plan.group
    result = Result(out, lse_out, values, extra.sinks, output_scale, num_heads)
    gl.warp_specialize(
        [
            (_consume, (0, ring, turns, q_memory, rows, scale, tile, result, SATURATES, plan)),
            (_consume, (1, ring, turns, q_memory, rows, scale, tile, result, SATURATES, plan)),
            (_produce, (ring, key_boxes, value_boxes, tile, plan)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, 24],
    )


def boxes_of(cache: Tensor, plan: Plan) -> TensorDescriptor:
    """Return the descriptor by which the TMA fetches half rows of a block of `cache`."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    box = [1, 1, min(plan.page, plan.block_n), HALF.value]
    cache = cache.transpose(1, 2)
    return TensorDescriptor(cache, list(cache.shape), list(cache.stride()), box, layout)
