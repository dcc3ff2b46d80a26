"""tkv::rotary_embedding: rotate queries and keys by their positions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_tkv.ops.checks import FLOAT_DTYPES, Checker
from torch_tkv.ops.library import define

_checker = Checker("rotary_embedding")


class RotatedHeads(NamedTuple):
    """What `rotary_embedding` returns."""

    query: Tensor
    key: Tensor


def rotary_embedding(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> RotatedHeads:
    """Rotate the heads of queries and keys by their positions (RoPE), into fresh tensors.

    The first R = `rotary_dim` elements of a head form R / 2 pairs. A pair (x, y) becomes
    (x cos - y sin, y cos + x sin), computed in float32 and rounded once to query's dtype. The other
    D - R elements are copied.

    Args:
        query: [T, Hq, D], float32, float16 or bfloat16; any strides whose last is 1.
        key: [T, Hkv, D] in query's dtype, with strides of its own.
        cos: [M, R] or [M, R / 2], float32, float16 or bfloat16, any strides. With R columns every
            element of a head has its own, with R / 2 the two of a pair share one. A row is a
            position, or a token where there are no positions: M = T.
        sin: as cos, in its dtype, with strides of its own.
        positions: [T], int32 or int64, rows of cos and sin; None where these are given per token.
        interleaved: pairs are elements (2 j, 2 j + 1), as in GPT-J, instead of (j, j + R / 2), as
            in GPT-NeoX and Llama of Hugging Face.
        rotary_dim: R, even and at most D; None is D. It is an argument because the width of cos
            does not tell R from R / 2.

    Returns:
        Query [T, Hq, D] and key [T, Hkv, D], contiguous: bit-equal to
        `x.float() * cos.float() + rotate_half(x.float()) * sin.float()`, rounded to query's dtype.

    Raises:
        TypeError: a dtype is none of the above.
        ValueError: shapes, strides or devices do not fit together.
        IndexError: on CPU, a position is no row of cos. On a GPU cos and sin count as 0 there, and
            TKV_DEBUG=1 makes it a device assert.
        NotImplementedError: autograd would record the call.
    """
    rotated = torch.ops.tkv.rotary_embedding(
        query, key, cos, sin, positions, interleaved=interleaved, rotary_dim=rotary_dim
    )
    return RotatedHeads(*rotated)


def check_rotation(
    checker: Checker,
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    rotary_dim: int | None,
) -> None:
    """Require queries, keys and angles that fit together."""
    require = checker.require
    checker.floats("query", query, "[T, Hq, D]")
    checker.layout("key", key, "[T, Hkv, D]", (query.dtype,))
    checker.floats("key", key, "[T, Hkv, D]")
    checker.layout("cos", cos, "[M, R]", FLOAT_DTYPES)
    checker.layout("sin", sin, "[M, R]", (cos.dtype,))
    checker.same_device(query.device, key=key, cos=cos, sin=sin)
    tokens, heads, head_size = query.shape
    require(heads > 0 and head_size > 0, "query", "[T, Hq, D] with Hq and D > 0", query)
    ok = key.shape[0] == tokens and key.shape[1] > 0 and key.shape[2] == head_size
    require(ok, "key", f"[T = {tokens}, Hkv > 0, D = {head_size}] like query", key)
    size = head_size if rotary_dim is None else rotary_dim
    ok = size % 2 == 0 and 0 < size <= head_size
    require(ok, "rotary_dim", f"even, positive and at most D = {head_size}", size)
    ok = cos.shape[1] in (size, size // 2)
    require(ok, "cos", f"[M, R = {size}] or [M, R / 2 = {size // 2}]", cos)
    require(sin.shape == cos.shape, "sin", f"{tuple(cos.shape)} like cos", sin)
    if positions is None:
        ok = cos.shape[0] == tokens
        require(ok, "cos", f"[T = {tokens}, R] like query where there are no positions", cos)
    else:
        checker.indices("positions", positions, "[T]")
        checker.same_device(query.device, positions=positions)
        require(positions.shape[0] == tokens, "positions", f"[T = {tokens}] like query", positions)


def check_positions(checker: Checker, positions: Tensor | None, cos: Tensor) -> None:
    """Require positions that are rows of `cos`; reads values, so on CPU only."""
    if positions is None:
        return
    outside = (positions < 0) | (positions >= cos.shape[0])
    if outside.any():
        token = int(outside.nonzero()[0])
        got = f"{int(positions[token])} for token {token}"
        requirement = f"within the {cos.shape[0]} rows of cos"
        checker.require(False, "positions", requirement, got, IndexError)


def _check(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> None:
    check_rotation(_checker, query, key, cos, sin, positions, rotary_dim)


def _check_indices(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    **options: object,
) -> None:
    check_positions(_checker, positions, cos)


def _fake(query: Tensor, key: Tensor, *args: object, **options: object) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


define(
    "rotary_embedding(Tensor query, Tensor key, Tensor cos, Tensor sin, Tensor? positions=None, *, "
    "bool interleaved=False, int? rotary_dim=None) -> (Tensor, Tensor)",
    check=_check,
    check_indices=_check_indices,
    fake=_fake,
)
