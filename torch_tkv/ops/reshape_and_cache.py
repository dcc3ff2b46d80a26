"""tkv::reshape_and_cache: write keys and values into the slots of a paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_tkv.ops.checks import CACHE_DTYPES, Checker
from torch_tkv.ops.library import define

_checker = Checker("reshape_and_cache")


def reshape_and_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    wrap: bool = False,
) -> None:
    """Write keys and values into the slots of a paged cache, in place.

    Token `t` goes to `cache[slot // P, slot % P]` with `slot = slot_mapping[t]`. Tokens past the
    end of `slot_mapping` and tokens with a negative slot are not written. Where tokens share a
    slot, each of its elements is that of one of them.

    Args:
        key: [T, Hkv, D], float32, float16 or bfloat16; any strides whose last is 1.
        value: [T, Hkv, Dv] in key's dtype, with strides of its own.
        key_cache: [N, P, Hkv, D], float32, float16, bfloat16, float8_e4m3fn or float8_e5m2; any
            strides whose last is 1: NHD, HND and packed layouts alike. Keys are rounded once to its
            dtype; float8 saturates, infinities too, and keeps NaN.
        value_cache: [N, P, Hkv, Dv], with strides and a dtype of its own.
        slot_mapping: [<= T], int32 or int64; `slot = block * P + offset`.
        k_scale: float32 [] or [Hkv]; keys are divided by it in float32. None means 1.
        v_scale: the same for values.
        wrap: a slot in [-N * P, -1] counts from the end of the cache, as in eager indexing,
            instead of being skipped.

    Raises:
        TypeError: a dtype is none of the above, or float8_e4m3fn on a GPU that lacks it.
        ValueError: shapes, strides or devices do not fit together.
        IndexError: on CPU, a slot lies outside the cache. On a GPU such a slot is dropped, and
            TKV_DEBUG=1 makes it a device assert.
        NotImplementedError: autograd would record the call.
    """
    torch.ops.tkv.reshape_and_cache(
        key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale, wrap=wrap
    )


def _check(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    wrap: bool = False,
) -> None:
    _checker.caches(key_cache, value_cache, CACHE_DTYPES)
    _checker.rows(key, value, slot_mapping, k_scale, v_scale)
    _checker.fits(key, value, key_cache, value_cache)


def _check_indices(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    wrap: bool = False,
) -> None:
    _checker.slots(slot_mapping, key_cache.shape[0] * key_cache.shape[1], wrap)


define(
    "reshape_and_cache(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor slot_mapping, Tensor? k_scale=None, Tensor? v_scale=None, *, bool wrap=False) -> ()",
    check=_check,
    check_indices=_check_indices,
)
