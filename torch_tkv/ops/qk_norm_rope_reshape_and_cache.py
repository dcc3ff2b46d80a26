"""tkv::qk_norm_rope_reshape_and_cache: norm and rotate queries and keys, write keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_tkv.ops.checks import CACHE_DTYPES, Checker
from torch_tkv.ops.library import define
from torch_tkv.ops.rotary_embedding import check_positions, check_rotation

_checker = Checker("qk_norm_rope_reshape_and_cache")


def qk_norm_rope_reshape_and_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    weight_plus_one: bool = False,
    wrap: bool = False,
) -> Tensor:
    """RMS-norm the heads of queries and keys, then do as `rope_reshape_and_cache`.

    A head x becomes `x / sqrt(mean(x ** 2) + eps) * weight`, over all of its D elements, in
    float32, and is rotated without having been rounded.

    Args:
        query: [T, Hq, D], float32, float16 or bfloat16; any strides whose last is 1.
        key: [T, Hkv, D] in query's dtype, with strides of its own.
        value: [T, Hkv, Dv] in query's dtype, with strides of its own; it is not normed.
        cos: [M, R] or [M, R / 2], as in `rotary_embedding`.
        sin: as cos.
        positions: [T], rows of cos and sin, or None where these are given per token: M = T.
        key_cache: [N, P, Hkv, D], written in place, as in `reshape_and_cache`.
        value_cache: [N, P, Hkv, Dv], written in place.
        slot_mapping: [<= T], int32 or int64; `slot = block * P + offset`, negative to skip.
        q_weight: [D], float32, float16 or bfloat16, shared by the query heads.
        k_weight: [D], with a dtype of its own, shared by the KV heads.
        eps: added to the mean square.
        k_scale: float32 [] or [Hkv]; keys are divided by it, after their rounding to query's dtype.
        v_scale: the same for values.
        interleaved: pairs are elements (2 j, 2 j + 1) instead of (j, j + R / 2).
        rotary_dim: R, even and at most D; None is D.
        weight_plus_one: multiply with 1 + weight, as in Gemma.
        wrap: a slot in [-N * P, -1] counts from the end of the cache, as in eager indexing,
            instead of being skipped.

    Returns:
        Query [T, Hq, D], normed and rotated, contiguous. With u half the spacing of query's dtype
        at 1 and (x, y) the normed pair, an element errs by at most u times itself, plus float32's
        own error. A model that rounds the normed heads once before the rotation (Gemma) errs by up
        to u (|x cos| + |y sin|) more, one that rounds before and after the weight (Qwen3) by up to
        2 u (|x cos| + |y sin|) more; both to first order, and given a rotation in float32.

    Raises:
        TypeError: a dtype is none of the above, or float8_e4m3fn on a GPU that lacks it.
        ValueError: shapes, strides or devices do not fit together.
        IndexError: on CPU, a slot or a position lies outside. On a GPU such a slot is dropped, cos
            and sin count as 0, and TKV_DEBUG=1 makes either a device assert.
        NotImplementedError: autograd would record the call.
    """
    out: Tensor = torch.ops.tkv.qk_norm_rope_reshape_and_cache(
        *(query, key, value, cos, sin, positions),
        *(key_cache, value_cache, slot_mapping, q_weight, k_weight, eps, k_scale, v_scale),
        interleaved=interleaved,
        rotary_dim=rotary_dim,
        weight_plus_one=weight_plus_one,
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
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    weight_plus_one: bool = False,
    wrap: bool = False,
) -> None:
    check_rotation(_checker, query, key, cos, sin, positions, rotary_dim)
    _checker.caches(key_cache, value_cache, CACHE_DTYPES)
    _checker.rows(key, value, slot_mapping, k_scale, v_scale)
    _checker.fits(key, value, key_cache, value_cache)
    _checker.same_device(query.device, q_weight=q_weight, k_weight=k_weight)
    head_size = query.shape[2]
    for argument, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        _checker.floats(argument, weight, "[D]")
        ok = weight.shape[0] == head_size
        _checker.require(ok, argument, f"[D = {head_size}] like query", weight)


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
    *norm_and_scales: object,
    wrap: bool = False,
    **options: object,
) -> None:
    check_positions(_checker, positions, cos)
    _checker.slots(slot_mapping, key_cache.shape[0] * key_cache.shape[1], wrap)


def _fake(query: Tensor, *args: object, **options: object) -> Tensor:
    return query.new_empty(query.shape)


define(
    "qk_norm_rope_reshape_and_cache(Tensor query, Tensor key, Tensor value, Tensor cos, "
    "Tensor sin, Tensor? positions, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor slot_mapping, Tensor q_weight, Tensor k_weight, float eps, Tensor? k_scale=None, "
    "Tensor? v_scale=None, *, bool interleaved=False, int? rotary_dim=None, "
    "bool weight_plus_one=False, bool wrap=False) -> Tensor",
    check=_check,
    check_indices=_check_indices,
    fake=_fake,
)
