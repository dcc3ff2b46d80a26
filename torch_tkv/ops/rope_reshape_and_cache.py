"""tkv::rope_reshape_and_cache: rotate queries and keys, write keys and values into cache slots."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_tkv.ops.checks import CACHE_DTYPES, Checker
from torch_tkv.ops.library import define
from torch_tkv.ops.rotary_embedding import check_positions, check_rotation

_checker = Checker("rope_reshape_and_cache")


def rope_reshape_and_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    wrap: bool = False,
) -> Tensor:
    """Rotate queries and keys (RoPE), and write keys and values into the slots of a paged cache.

    `rotary_embedding`, then `reshape_and_cache` of the rotated key, in one launch. The query of
    every token is rotated, also where the token has no slot or a negative one.

    Args:
        query: [T, Hq, D], float32, float16 or bfloat16; any strides whose last is 1.
        key: [T, Hkv, D] in query's dtype, with strides of its own.
        value: [T, Hkv, Dv] in query's dtype, with strides of its own.
        cos: [M, R] or [M, R / 2], as in `rotary_embedding`.
        sin: as cos.
        positions: [T], rows of cos and sin, or None where these are given per token: M = T.
        key_cache: [N, P, Hkv, D], written in place, as in `reshape_and_cache`.
        value_cache: [N, P, Hkv, Dv], written in place.
        slot_mapping: [<= T], int32 or int64; `slot = block * P + offset`, negative to skip.
        k_scale: float32 [] or [Hkv]; keys are divided by it, after their rounding to query's dtype.
        v_scale: the same for values.
        interleaved: pairs are elements (2 j, 2 j + 1) instead of (j, j + R / 2).
        rotary_dim: R, even and at most D; None is D.
        wrap: a slot in [-N * P, -1] counts from the end of the cache, as in eager indexing,
            instead of being skipped.

    Returns:
        Query [T, Hq, D], rotated, contiguous. It and the caches are bit-equal to what
        `rotary_embedding` and `reshape_and_cache` give.

    Raises:
        TypeError: a dtype is none of the above, or float8_e4m3fn on a GPU that lacks it.
        ValueError: shapes, strides or devices do not fit together.
        IndexError: on CPU, a slot or a position lies outside. On a GPU such a slot is dropped, cos
            and sin count as 0, and TKV_DEBUG=1 makes either a device assert.
        NotImplementedError: autograd would record the call.
    """
    out: Tensor = torch.ops.tkv.rope_reshape_and_cache(
        *(query, key, value, cos, sin, positions),
        *(key_cache, value_cache, slot_mapping, k_scale, v_scale),
        interleaved=interleaved,
        rotary_dim=rotary_dim,
        wrap=wrap,
    )
    return out


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    wrap: bool = False,
) -> None:
    check_rotation(_checker, query, key, cos, sin, positions, rotary_dim)
    _checker.caches(key_cache, value_cache, CACHE_DTYPES)
    _checker.rows(key, value, slot_mapping, k_scale, v_scale)
    _checker.fits(key, value, key_cache, value_cache)


def _check_indices(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *scales: object,
    wrap: bool = False,
    **options: object,
) -> None:
    check_positions(_checker, positions, cos)
    _checker.slots(slot_mapping, key_cache.shape[0] * key_cache.shape[1], wrap)


def _fake(query: Tensor, *args: object, **options: object) -> Tensor:
    return query.new_empty(query.shape)


define(
    "rope_reshape_and_cache(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, "
    "Tensor? positions, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slot_mapping, "
    "Tensor? k_scale=None, Tensor? v_scale=None, *, bool interleaved=False, int? rotary_dim=None, "
    "bool wrap=False) -> Tensor",
    check=_check,
    check_indices=_check_indices,
    fake=_fake,
)
