"""The rows of a consumer, prefilling on Hopper: queries come in, results go out."""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from torch_tkv.kernels.attention_geometry import query_rows
from torch_tkv.kernels.attention_result import finish_rows, store_rows
from torch_tkv.kernels.attention_tiles import to_half
from torch_tkv.kernels.hopper_ring import barrier

ROWS = gl.constexpr(64)  # of a consumer


@gluon.jit
def load_queries(WHICH: gl.constexpr, query, tile, plan: gl.constexpr):
    """Return a consumer's rows of a tile of queries."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    m = WHICH * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    rows = query_rows(m, tile.seq, tile.query_tile, tile.kv_head, plan)
    dim = gl.arange(0, plan.block_d, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    row = rows.token.to(gl.int64) * query[1] + rows.head.to(gl.int64) * query[2]
    mask = rows.inside[:, None] & (dim < plan.size)
    return gl.load(query[0] + row[:, None] + dim, mask=mask, other=0.0)


@gluon.jit
def put_queries(q, loaded, plan: gl.constexpr):
    """Put queries where the tensor cores read them, and return what they have to be scaled by."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, plan.block_n, 16])
    power = gl.full([ROWS], 1.0, gl.float32, layout=gl.SliceLayout(1, SCORES))
    if loaded.dtype != q.dtype:  # the caches are of 8 bits
        # What is converted is read back: else it would be unpacked, into twice as many registers,
        # long before, when it is loaded.
        q.store(loaded.to(q.dtype, bitcast=True))
        loaded = q.load(loaded.type.layout).to(loaded.dtype, bitcast=True)
        halves, back = to_half((loaded,), plan)
        loaded, power = halves[0], gl.convert_layout(back, power.type.layout)
    q.store(loaded)
    fence_async_shared()
    barrier()
    return power


@gluon.jit
def store_tile(
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
    rows = query_rows(m, tile.seq, tile.query_tile, tile.kv_head, plan)
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
    rows = query_rows(m, tile.seq, tile.query_tile, tile.kv_head, plan)
    store_rows(
        result,
        gl.convert_layout(x, STORED),
        gl.convert_layout(lse, STORED),
        rows.token[:, None],
        rows.head[:, None],
        gl.arange(0, plan.block_d, layout=gl.SliceLayout(0, STORED))[None, :],
        rows.inside[:, None],
        plan,
    )
