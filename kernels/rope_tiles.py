"""Tiles of the rotating kernels: the heads of one token, and the angles that they turn by.

The first R of the D elements of a head form R / 2 pairs, (j, j + R / 2), or (2 j, 2 j + 1) where
INTERLEAVED. A tile of heads is a triple: the pairs' first elements and their second ones, both
[1, heads, BLOCK_R], and the elements [1, heads, BLOCK_REST] past R, or 0 where there are none.
What tiles of heads have in common, angles and weights, is a tile of a row for each head, so that a
thread has those of its own elements. Of one row for all heads it would have others, and Triton
would pass the heads through shared memory to and fro.
"""

from __future__ import annotations

import triton
import triton.language as tl

from torch_tkv.kernels.cache_tiles import divide_to_cache


@triton.jit
def load_pairs(
    row,  # [1, heads, 1] pointers, or one
    stride,
    inside,  # as row
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Return the first and the second elements of the pairs of each row."""
    HALF: tl.constexpr = R // 2
    if INTERLEAVED:
        # One wide load that threads take apart: elements of a pair share no 16-byte access else.
        dim = tl.arange(0, 2 * BLOCK_R)[None, None, :]
        inside = inside & (dim < R)
        x = tl.load(row + dim * stride, mask=inside, other=0.0, eviction_policy=EVICTION)
        first, second = tl.split(tl.reshape(x, [1, x.shape[1], BLOCK_R, 2]))
    else:
        pair = tl.arange(0, BLOCK_R)[None, None, :]
        inside = inside & (pair < HALF)
        left, right = row + pair * stride, row + (pair + HALF) * stride
        first = tl.load(left, mask=inside, other=0.0, eviction_policy=EVICTION)
        second = tl.load(right, mask=inside, other=0.0, eviction_policy=EVICTION)
    return first, second


@triton.jit
def find_angle(
    positions,  # [T], or None
    token,
    stride,
    num_angles,  # rows of cos and of sin
):
    """Return the row of cos and sin for `token`, or -1 where its position lies outside of them."""
    angle = token
    if positions is not None:
        position = tl.load(positions + token * stride).to(tl.int64)
        inside = position.to(tl.uint64) < num_angles.to(tl.uint64)
        tl.device_assert(inside, "positions: a position lies outside cos and sin")
        angle = tl.where(inside, position.to(num_angles.dtype), -1)
    return angle


@triton.jit
def load_angles(
    cos,  # [T or positions, R or R / 2]
    sin,  # as cos
    angle,  # [1, 1, 1], a row of them, or -1
    cos_strides,  # of rows and columns
    sin_strides,
    HEADS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FULL_WIDTH: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Return the cos and the sin of a tile of heads: each a pair [1, HEADS, BLOCK_R] of float32.

    The first and the second elements of the heads' pairs are multiplied with the first and the
    second of it.
    """
    c = _load_table(cos, angle, cos_strides, HEADS, R, BLOCK_R, INTERLEAVED, FULL_WIDTH, EVICTION)
    s = _load_table(sin, angle, sin_strides, HEADS, R, BLOCK_R, INTERLEAVED, FULL_WIDTH, EVICTION)
    return c, s


@triton.jit
def _load_table(
    table,
    angle,
    strides,
    HEADS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FULL_WIDTH: tl.constexpr,
    EVICTION: tl.constexpr,
):
    row = tl.broadcast_to(table + angle.to(tl.int64) * strides[0], [1, HEADS, 1])
    if FULL_WIDTH:  # a column an element
        first, second = load_pairs(row, strides[1], angle >= 0, R, BLOCK_R, INTERLEAVED, EVICTION)
    else:  # a column a pair
        pair = tl.arange(0, BLOCK_R)[None, None, :]
        place, inside = row + pair * strides[1], (angle >= 0) & (pair < R // 2)
        first = tl.load(place, mask=inside, other=0.0, eviction_policy=EVICTION)
        second = first
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def load_heads(
    row,  # [1, heads, 1] pointers
    inside,  # [1, heads, 1]
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Return a tile of heads in the dtype of the model."""
    first, second = load_pairs(row, 1, inside, R, BLOCK_R, INTERLEAVED, "")
    rest = 0.0
    if BLOCK_REST > 0:
        dim = R + tl.arange(0, BLOCK_REST)[None, None, :]
        rest = tl.load(row + dim, mask=inside & (dim < D), other=0.0)
    return first, second, rest


@triton.jit
def load_weight(
    weight,  # [D], or None where heads are not normed
    HEADS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Return the weight of a norm as a tile of heads, or None."""
    heads = None
    if weight is not None:
        rows = tl.broadcast_to(weight, [1, HEADS, 1])
        everywhere = tl.zeros([1, 1, 1], tl.int32) == 0
        heads = load_heads(rows, everywhere, D, R, BLOCK_R, BLOCK_REST, INTERLEAVED)
    return heads


@triton.jit
def store_heads(
    row,  # [1, heads, 1] pointers
    inside,  # [1, heads, 1]
    heads,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Store a tile of heads that has the dtype of its destination."""
    HALF: tl.constexpr = R // 2
    first, second, rest = heads
    if INTERLEAVED:
        dim = tl.arange(0, 2 * BLOCK_R)[None, None, :]
        x = tl.reshape(tl.join(first, second), [1, first.shape[1], 2 * BLOCK_R])
        tl.store(row + dim, x, mask=inside & (dim < R))
    else:
        pair = tl.arange(0, BLOCK_R)[None, None, :]
        tl.store(row + pair, first, mask=inside & (pair < HALF))
        tl.store(row + pair + HALF, second, mask=inside & (pair < HALF))
    if BLOCK_REST > 0:
        dim = R + tl.arange(0, BLOCK_REST)[None, None, :]
        tl.store(row + dim, rest, mask=inside & (dim < D))


@triton.jit
def rotate_heads(
    heads,
    angles,  # as of load_angles
    weight,  # as of load_weight
    eps,
    DTYPE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    WEIGHT_PLUS_ONE: tl.constexpr,
):
    """Return a tile of heads, normed and rotated in float32, rounded once to DTYPE."""
    first, second, rest = heads
    cos, sin = angles
    x = first.to(tl.float32)
    y = second.to(tl.float32)
    if BLOCK_REST > 0:
        rest = rest.to(tl.float32)
    if weight is not None:
        squares = tl.sum(x * x + y * y, 2, keep_dims=True)
        if BLOCK_REST > 0:
            squares += tl.sum(rest * rest, 2, keep_dims=True)
        inverse = tl.rsqrt(squares / D + eps)
        x = _scale(x, inverse, weight[0], WEIGHT_PLUS_ONE)
        y = _scale(y, inverse, weight[1], WEIGHT_PLUS_ONE)
        if BLOCK_REST > 0:
            rest = _scale(rest, inverse, weight[2], WEIGHT_PLUS_ONE)
    # A launch without fp fusion rounds the products as x * cos + rotate_half(x) * sin does.
    first = (x * cos[0] - y * sin[0]).to(DTYPE)
    second = (y * cos[1] + x * sin[1]).to(DTYPE)
    if BLOCK_REST > 0:
        rest = rest.to(DTYPE)
    return first, second, rest


@triton.jit
def _scale(x, inverse, weight, WEIGHT_PLUS_ONE: tl.constexpr):
    weight = weight.to(tl.float32)
    if WEIGHT_PLUS_ONE:
        weight = weight + 1.0
    return x * inverse * weight


@triton.jit
def heads_to_cache(
    heads,
    factor,  # as of load_scale
    DTYPE: tl.constexpr,
    SATURATES_AT: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Return a tile of heads as `divide_to_cache` rounds it."""
    first, second, rest = heads
    first = divide_to_cache(first, factor, DTYPE, SATURATES_AT)
    second = divide_to_cache(second, factor, DTYPE, SATURATES_AT)
    if BLOCK_REST > 0:
        rest = divide_to_cache(rest, factor, DTYPE, SATURATES_AT)
    return first, second, rest
