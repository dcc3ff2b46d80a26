"""Prefilling on Hopper: softmax(scale * q k^T + mask) v for tiles of queries, warp-specialised.

A program takes tiles of queries, 64 rows to each of two or three consumers of four warps. Two more
warps, the producers, fetch the blocks of keys and of values into rings of shared memory, those of
the next tile while the consumers end one. While one consumer multiplies, another takes its softmax:
they take turns (FlashAttention-3; Shah et al., 2024). Keys are walked from the last to the first,
so only the first tiles of keys are masked. With caches of 8 bits one producer fetches both, and two
warps convert: see hopper_convert. Written in Gluon: Triton does not specialise these loops
on sm_90.
"""

from __future__ import annotations

import torch
import triton.experimental.gluon.language as gl
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from torch_tkv.kernels.attention_geometry import SIZES, Plan, query_rows, visible
from torch_tkv.kernels.attention_result import Result
from torch_tkv.kernels.attention_tiles import (
    LOG2E,
    Modifiers,
    modify,
    scale_of_head,
    softmax_step,
)
from torch_tkv.kernels.hopper_convert import (
    CONVERTERS,
    SCALES,
    allocate_scales,
    convert,
    produce_codes,
)
from torch_tkv.kernels.hopper_ring import (
    STAGES,
    Ring,
    allocate,
    barriers,
    clear_unread,
    produce,
)
from torch_tkv.kernels.hopper_rows import ROWS, load_queries, put_queries, store_tile
from torch_tkv.kernels.tile_list import Work, known, load_entry, num_turns, tile_of

# Note [Wait for keys]
# While a consumer takes a softmax, the tensor cores multiply its last weights with values. ptxas
# would wait for this product before the softmax: it moves that wait up, as nothing in PTX ties it
# to what it waits for, but not past a branch. The wait for the next keys has one, and comes between
# the two. Prefilling 1 x 16384, 4 x 1024 behind 16384, 4 x 4096 and 16 x 1024 tokens became 0.6,
# 1.1, 1.7 and 2.6% faster, with heads of 128 (H200, Triton 3.6, 2026-11-30). Three consumers, and
# two with heads of 256, have too few registers to hold scores and results at once: they wait for
# keys where they use them, with which heads of 192 and 256 were 4 to 7% faster (the same).


@gluon.jit
def _wait_keys(ring, step, AHEAD: gl.constexpr, plan: gl.constexpr):
    """Wait for a tile of keys, if this kind of plan does AHEAD of its use, or does not."""
    if (plan.block_m // ROWS == 2 and plan.block_d <= 128) == AHEAD:
        mbarrier.wait(ring.k.full.index(step % STAGES), step // STAGES & 1)


@gluon.jit
def _start_scores(WHICH: gl.constexpr, ring, turns, q, step, plan: gl.constexpr):
    """Start to multiply queries with a tile of keys, when it is there and it is this one's turn."""
    _wait_keys(ring, step, False, plan)
    mbarrier.wait(turns.index(WHICH), step & 1)
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, plan.block_n, 16])
    zeros = gl.full([ROWS, plan.block_n], 0.0, gl.float32, layout=LAYOUT)
    k = ring.k.matrices.index(step % STAGES).permute((1, 0))
    return warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)


@gluon.jit
def _pass_turn(WHICH: gl.constexpr, turns, plan: gl.constexpr):
    mbarrier.arrive(turns.index((WHICH + 1) % (plan.block_m // ROWS)), count=1)


@gluon.jit
def _softmax(scores, state, ring, step, tile, about, MASKED: gl.constexpr, plan: gl.constexpr):
    """Return the weights of a tile of keys, for the next product, and the new state."""
    highest, total = state
    factor, scale, rows, blocks = about
    LAYOUT: gl.constexpr = scores.type.layout
    COLUMNS: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    columns = gl.arange(0, plan.block_n, layout=COLUMNS)
    if ring.k_scales is not None:
        scores *= ring.k_scales.index(step % SCALES).load(COLUMNS)[None, :]
    key_position = (tile * plan.block_n + columns)[None, :]
    if plan.softcap is not None:
        nothing = Modifiers(None, None, None, None, None)
        scores = modify(
            scores * scale[:, None], key_position, rows.position[:, None], nothing, plan
        )
    if MASKED:
        seen = visible(key_position, rows.position[:, None], blocks.end, plan)
        scores = gl.where(seen, scores, float("-inf"))
    weights, rescale, highest, total = softmax_step(scores, factor, highest, total)
    if ring.v_scales is not None:
        weights *= ring.v_scales.index(step % SCALES).load(COLUMNS)[None, :]
    return weights, rescale, highest, total


@gluon.jit
def _operand(weights, DTYPE: gl.constexpr, plan: gl.constexpr):
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, plan.block_d, 16])
    return gl.convert_layout(weights.to(DTYPE), gl.DotOperandLayout(0, LAYOUT, 2))


@gluon.jit
def _consume(WHICH: gl.constexpr, shared, SATURATES: gl.constexpr, plan: gl.constexpr):
    """Attend 64 rows of each tile of queries to all its tiles of keys."""
    ring, turns, q_memory, query, _, _, work, result = shared
    q = q_memory.index(WHICH)
    # Of a tuple that nests others, Triton 3.6 carries some fields into the next turn, not all.
    following = known(load_entry(0, work), work, plan)
    loaded = load_queries(WHICH, query, tile_of(following, work, plan), plan)
    power = put_queries(q, loaded, plan)
    _wait_keys(ring, 0, True, plan)
    scores = _start_scores(WHICH, ring, turns, q, 0, plan)
    _pass_turn(WHICH, turns, plan)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(ring.k.free.index(0), count=1)
    done = 0
    for turn in range(num_turns(work)):
        tile = tile_of(following, work, plan)
        ahead = load_entry(turn + 1, work)
        acc, highest, total, scores, power, following = _attend_tile(
            WHICH, shared, q, scores, power, tile, ahead, done, plan
        )
        store_tile(WHICH, result, acc, highest, total, tile, SATURATES, plan)
        done += tile.walk.hi - tile.walk.lo


@gluon.jit
def _attend_tile(
    WHICH: gl.constexpr,
    shared,
    q,
    scores,  # of its first tile of keys
    power,  # what they have to be scaled by
    tile,
    ahead,  # entry of the next tile of queries
    done,  # tiles of keys before this tile of queries
    plan: gl.constexpr,
):
    """Return the sum of the weighted values, the highest score and the sum of the weights.

    The last values are multiplied together with the first keys of the next tile of queries, whose
    scores and entry are returned, too.
    """
    ring, turns, _, query, keys, scale, work, _ = shared
    SCORES: gl.constexpr = scores.type.layout
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, plan.block_d, 16])
    walk, blocks = tile.walk, tile.blocks
    steps = walk.hi - walk.lo
    m = WHICH * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    rows = query_rows(m, tile.seq, tile.query_tile, tile.kv_head, plan)
    scale = power * (scale * scale_of_head(keys, tile.kv_head))
    factor = gl.full([ROWS], LOG2E, gl.float32, layout=gl.SliceLayout(1, SCORES))
    if plan.softcap is None:
        factor *= scale
    highest = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
    total = gl.full([ROWS], 0.0, gl.float32, layout=gl.SliceLayout(1, SCORES))
    acc = gl.full([ROWS, plan.block_d], 0.0, gl.float32, layout=RESULT)
    about = (factor, scale, rows, blocks)
    weights, _, highest, total = _softmax(
        scores, (highest, total), ring, done, walk.hi - 1, about, True, plan
    )
    _wait_keys(ring, done + 1, True, plan)
    clear_unread(ring, done, walk.hi - 1, tile.seq.length, False, plan)
    state = (_operand(weights, q.dtype, plan), acc, highest, total)
    context = (ring, turns, q, done, walk.hi - 1, about)
    above = gl.minimum(gl.maximum(walk.hi - walk.masked_from, 1), steps)
    below = steps
    if plan.window is not None:
        below = gl.maximum(walk.hi - walk.masked_below, above)
    # No loop: two that follow each other would move the weights at every step of the second.
    MASKED: gl.constexpr = (plan.most_tokens + 2 * plan.block_n - 3) // plan.block_n
    for step in gl.static_range(1, MASKED):
        if step < above:
            state = _step(WHICH, state, step, *context, True, plan)
    following = known(ahead, work, plan)
    # Where registers are enough, the next queries are loaded while these meet their keys. Heads of
    # 256 spilled: 1 x 8192 tokens of 16 and 16 heads took 4% more time, 1 x 1024 15% (H200, Triton
    # 3.6, 2026-12-01).
    EARLY: gl.constexpr = plan.block_d <= 128
    if EARLY:
        loaded = load_queries(WHICH, query, tile_of(following, work, plan), plan)
    for step in range(above, below):
        state = _step(WHICH, state, step, *context, False, plan)
    if plan.window is not None:
        for step in range(below, steps):
            state = _step(WHICH, state, step, *context, True, plan)
    weights, acc, highest, total = state
    if not EARLY:
        loaded = load_queries(WHICH, query, tile_of(following, work, plan), plan)
    power = put_queries(q, loaded, plan)
    now, last = done + steps, done + steps - 1
    scores = _start_scores(WHICH, ring, turns, q, now, plan)
    mbarrier.wait(ring.v.full.index(last % STAGES), last // STAGES & 1)
    if plan.window is not None:
        clear_unread(ring, last, walk.lo, blocks.begin, True, plan)
    acc = warpgroup_mma(weights, ring.v.matrices.index(last % STAGES), acc, is_async=True)
    _pass_turn(WHICH, turns, plan)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(ring.k.free.index(now % STAGES), count=1)
    acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
    mbarrier.arrive(ring.v.free.index(last % STAGES), count=1)
    return acc, highest, total, scores, power, following


@gluon.jit
def _step(
    WHICH: gl.constexpr,
    state,
    step,
    ring,
    turns,
    q,
    done,
    last_tile,
    about,
    MASKED: gl.constexpr,
    plan: gl.constexpr,
):
    """Multiply a tile of keys, and with the weights of the tile before it that one's values."""
    weights, acc, highest, total = state
    now, before = done + step, done + step - 1
    scores = _start_scores(WHICH, ring, turns, q, now, plan)
    mbarrier.wait(ring.v.full.index(before % STAGES), before // STAGES & 1)
    acc = warpgroup_mma(weights, ring.v.matrices.index(before % STAGES), acc, is_async=True)
    _pass_turn(WHICH, turns, plan)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(ring.k.free.index(now % STAGES), count=1)
    new, rescale, highest, total = _softmax(
        scores, (highest, total), ring, now, last_tile - step, about, MASKED, plan
    )
    _wait_keys(ring, now + 1, True, plan)
    acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
    mbarrier.arrive(ring.v.free.index(before % STAGES), count=1)
    LAYOUT: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    acc = acc * gl.convert_layout(rescale, LAYOUT)[:, None]
    return _operand(new, weights.dtype, plan), acc, highest, total


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
    DTYPE: gl.constexpr = gl.float16 if plan.converts else query.dtype.element_ty
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    CONSUMERS: gl.constexpr = plan.block_m // ROWS
    q_memory = gl.allocate_shared_memory(DTYPE, [CONSUMERS, ROWS, plan.block_d], TILE)
    k = allocate(DTYPE, STAGES, CONSUMERS, plan)
    v = allocate(DTYPE, STAGES, CONSUMERS, plan)
    k_scales, v_scales = None, None
    if keys.scales is not None:
        k_scales, v_scales = allocate_scales(plan), allocate_scales(plan)
    ring = Ring(k, v, k_scales, v_scales)
    if plan.converts:
        CODES: gl.constexpr = 2 if plan.block_d <= 128 else 1  # stages; there is no room for more
        codes = allocate(gl.int8, CODES, 1, plan, 1 if keys.scales is None else 2)
    turns = barriers(CONSUMERS)
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()
    mbarrier.arrive(turns.index(0), count=1)
    rows = (query, query_stride_t, query_stride_h)
    sizes = (num_seqs, num_tokens, num_blocks, max_blocks * plan.page, kv_heads)
    work = Work(tiles, num_tiles, batch, *sizes)
    result = Result(out, lse_out, values, extra.sinks, output_scale, kv_heads * plan.group)
    shared = (ring, turns, q_memory, rows, keys, scale, work, result)
    if plan.pdl:
        tl.extra.cuda.gdc_wait()
    # Beside the warps of each part the registers of its threads. All start with 168, or 128 where
    # there are three consumers; the producers leave most of theirs.
    if plan.converts:
        boxes = (key_boxes, value_boxes)
        gl.warp_specialize(
            [
                (_consume, (0, shared, SATURATES, plan)),
                (_consume, (1, shared, SATURATES, plan)),
                (convert, (codes, keys, ring, work, CODES, plan)),
                (produce_codes, (boxes, (keys, values), codes, ring, work, CODES, plan)),
            ],
            [4, CONVERTERS, 1],
            [232, 40, 40],
        )
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, shared, SATURATES, plan)),
                (_consume, (1, shared, SATURATES, plan)),
                (produce, (key_boxes, ring.k, work, 1, plan)),
                (produce, (value_boxes, ring.v, work, 0, plan)),
            ],
            [4, 1, 1],
            [232, 40, 40],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (0, shared, SATURATES, plan)),
                (_consume, (1, shared, SATURATES, plan)),
                (_consume, (2, shared, SATURATES, plan)),
                (produce, (key_boxes, ring.k, work, 1, plan)),
                (produce, (value_boxes, ring.v, work, 0, plan)),
            ],
            [4, 4, 1, 1],
            [160, 160, 24, 24],
        )


def boxes_of(cache: Tensor, plan: Plan) -> TensorDescriptor:
    """Return the descriptor by which the TMA fetches rows of a block of `cache`, or half rows."""
    if plan.converts:
        cache = cache.view(torch.int8)
    bits = 8 * cache.element_size()
    width = min(plan.block_d, 1024 // bits)
    layout = gl.NVMMASharedLayout(width * bits // 8, bits, rank=4)
    box = [1, 1, min(plan.page, plan.block_n), width]
    cache = cache.transpose(1, 2)
    return TensorDescriptor(cache, list(cache.shape), list(cache.stride()), box, layout)
