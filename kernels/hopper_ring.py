"""The ring of shared memory of prefilling on Hopper, and the warps that fill it.

The tensor memory accelerator (TMA) fetches blocks of keys and of values box by box.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from torch_tkv.kernels.tile_list import known, load_entry, num_turns, tile_of

STAGES = gl.constexpr(2)

# Names that Gluon changed: in Triton 3.7 and in 3.9.
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_REINTERPRETS = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


class Stages(NamedTuple):
    """Shared memory that is filled with keys or values, and emptied."""

    matrices: Any  # [stages, block_n, D]
    boxes: Any  # the same memory, box by box
    full: Any  # barriers, [stages]
    free: Any


class Ring(NamedTuple):
    """The keys and the values that the consumers multiply with."""

    k: Stages
    v: Stages
    k_scales: Any  # None or [SCALES, block_n]; see Note [Converted caches] in hopper_convert
    v_scales: Any


@gluon.jit
def barriers(COUNT: gl.constexpr):
    """Return barriers in shared memory, which are still to be initialised."""
    return gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())


@gluon.jit
def matrices(memory, COUNT: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Return shared memory as matrices that follow each other."""
    BITS: gl.constexpr = memory.dtype.primitive_bitwidth
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(min(COLUMNS * BITS // 8, 128), BITS, 2)
    if _REINTERPRETS:
        return memory.reinterpret(memory.dtype, [COUNT, ROWS, COLUMNS], LAYOUT)
    else:
        return memory._reinterpret(memory.dtype, [COUNT, ROWS, COLUMNS], LAYOUT)


@gluon.jit
def allocate(
    DTYPE: gl.constexpr,
    COUNT: gl.constexpr,
    READERS: gl.constexpr,
    plan: gl.constexpr,
    ARRIVALS: gl.constexpr = 1,  # until a stage is full
):
    """Return COUNT stages, each of which READERS have to leave before it is filled again."""
    BITS: gl.constexpr = DTYPE.primitive_bitwidth
    SLOTS: gl.constexpr = min(plan.page, plan.block_n)
    WIDTH: gl.constexpr = min(plan.block_d, 1024 // BITS)  # a box of the TMA has 128 bytes a row
    BOXES: gl.constexpr = COUNT * (plan.block_d // WIDTH) * (plan.block_n // SLOTS)
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(WIDTH * BITS // 8, BITS, 4)
    boxes = gl.allocate_shared_memory(DTYPE, [BOXES, 1, 1, SLOTS, WIDTH], LAYOUT)
    full, free = barriers(COUNT), barriers(COUNT)
    for i in gl.static_range(COUNT):
        mbarrier.init(full.index(i), count=ARRIVALS)
        mbarrier.init(free.index(i), count=READERS)
    return Stages(matrices(boxes, COUNT, plan.block_n, plan.block_d), boxes, full, free)


@gluon.jit
def block_numbers(blocks, tile, plan: gl.constexpr):
    """Return the block numbers of a tile of keys; N for what is not read, or no block."""
    SLOTS: gl.constexpr = min(plan.page, plan.block_n)
    numbers = ()
    for box in gl.static_range(plan.block_n // SLOTS):
        position = tile * plan.block_n + box * SLOTS
        entry = blocks.row + (position // plan.page).to(gl.int64) * blocks.stride
        read = (position < blocks.end) & (position + SLOTS > blocks.begin)
        number = gl.load(entry, mask=read, other=-1)
        exists = (number >= 0) & (number < blocks.num_blocks)
        number = gl.where(exists, number, blocks.num_blocks).to(gl.int32)
        numbers = numbers + (number,)  # type: ignore[assignment]  # noqa: RUF005, no stars
    return numbers


@gluon.jit
def fetch(cache, numbers, tile, kv_head, stages, step, COUNT: gl.constexpr, plan: gl.constexpr):
    """Fetch a tile of a cache into one of COUNT stages; block number N arrives as zeros."""
    BITS: gl.constexpr = stages.boxes.dtype.primitive_bitwidth
    SLOTS: gl.constexpr = stages.boxes.shape[3]
    WIDTH: gl.constexpr = stages.boxes.shape[4]
    BOXES: gl.constexpr = plan.block_n // SLOTS
    PARTS: gl.constexpr = plan.block_d // WIDTH
    stage = step % COUNT
    mbarrier.wait(stages.free.index(stage), (step // COUNT & 1) ^ 1)
    mbarrier.expect(stages.full.index(stage), plan.block_n * plan.block_d * BITS // 8)
    for box in gl.static_range(BOXES):
        offset = (tile * plan.block_n + box * SLOTS) % plan.page
        for part in gl.static_range(PARTS):
            load_box(
                cache,
                [numbers[box], kv_head, offset, part * WIDTH],
                stages.full.index(stage),
                stages.boxes.index((stage * PARTS + part) * BOXES + box),
            )


@gluon.jit
def produce(cache, stages, work, AHEAD: gl.constexpr, plan: gl.constexpr):
    """Fetch the keys, or the values, of all tiles of queries, and the first AHEAD of one more."""
    step = 0
    ahead = load_entry(0, work)
    turns = num_turns(work)
    for turn in range(turns + AHEAD):
        queries = tile_of(known(ahead, work, plan), work, plan)
        ahead = load_entry(turn + 1, work)
        walk = queries.walk
        for n in range(gl.where(turn < turns, walk.hi - walk.lo, AHEAD)):
            tile = walk.hi - 1 - n
            numbers = block_numbers(queries.blocks, tile, plan)
            fetch(cache, numbers, tile, queries.kv_head, stages, step, STAGES, plan)
            step += 1


@gluon.jit
def clear_unread(ring, step, tile, position, BEFORE: gl.constexpr, plan: gl.constexpr):
    """Zero the values from a key position on, or BEFORE it, in its block: 0 * NaN is NaN."""
    SLOTS: gl.constexpr = ring.v.boxes.shape[3]
    WIDTH: gl.constexpr = ring.v.boxes.shape[4]
    BOXES: gl.constexpr = plan.block_n // SLOTS
    PARTS: gl.constexpr = plan.block_d // WIDTH
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    slot = position - tile * plan.block_n
    if (slot < plan.block_n) & (slot % SLOTS != 0):
        mbarrier.wait(ring.v.full.index(step % STAGES), step // STAGES & 1)
        row = gl.arange(0, SLOTS, layout=gl.SliceLayout(1, LAYOUT))[:, None]
        cleared = row < slot % SLOTS if BEFORE else row >= slot % SLOTS
        for part in gl.static_range(PARTS):
            box = ring.v.boxes.index(((step % STAGES) * PARTS + part) * BOXES + slot // SLOTS)
            box = matrices(box, 1, SLOTS, WIDTH).index(0)
            box.store(gl.where(cleared, 0.0, box.load(LAYOUT)))
        fence_async_shared()
        barrier()
