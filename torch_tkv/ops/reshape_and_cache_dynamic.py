"""tkv::reshape_and_cache_dynamic: write keys and values as 8-bit codes with their own scales."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_tkv.ops.checks import FP8_DTYPES, Checker
from torch_tkv.ops.library import define

_DTYPES = (torch.int8, *FP8_DTYPES)

_checker = Checker("reshape_and_cache_dynamic")


def reshape_and_cache_dynamic(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    k_scale_cache: Tensor,
    v_scale_cache: Tensor,
    slot_mapping: Tensor,
    *,
    wrap: bool = False,
) -> None:
    """Write keys and values into a paged cache as codes with a scale per token and head, in place.

    The scale of a row [D] is its largest magnitude over the largest code: 127 for int8, 448 for
    float8_e4m3fn, 57344 for float8_e5m2. The codes are the row over its scale, int8 rounded half to
    even; a reader multiplies. A row whose scale would be 0, as that of zeros, has the scale 1. A
    row that holds NaN or infinity has the scale NaN and codes of 0: all of it reads as NaN. Where
    tokens share a slot, its codes and its scale may be those of different ones.

    Args:
        key: [T, Hkv, D], float32, float16 or bfloat16; any strides whose last is 1.
        value: [T, Hkv, Dv] in key's dtype, with strides of its own.
        key_cache: [N, P, Hkv, D], int8, float8_e4m3fn or float8_e5m2; any strides whose last is 1.
        value_cache: [N, P, Hkv, Dv], with strides and a dtype of its own.
        k_scale_cache: [N, P, Hkv], float32; any strides.
        v_scale_cache: the same for values.
        slot_mapping: [<= T], int32 or int64; `slot = block * P + offset`, negative to skip.
        wrap: a slot in [-N * P, -1] counts from the end of the cache, as in eager indexing,
            instead of being skipped.

    Raises:
        TypeError: a dtype is none of the above, or float8_e4m3fn on a GPU that lacks it.
        ValueError: shapes, strides or devices do not fit together.
        IndexError: on CPU, a slot lies outside the cache. On a GPU such a slot is dropped, and
            TKV_DEBUG=1 makes it a device assert.
        NotImplementedError: autograd would record the call.
    """
    torch.ops.tkv.reshape_and_cache_dynamic(
        key, value, key_cache, value_cache, k_scale_cache, v_scale_cache, slot_mapping, wrap=wrap
    )


def _check(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    k_scale_cache: Tensor,
    v_scale_cache: Tensor,
    slot_mapping: Tensor,
    *,
    wrap: bool = False,
) -> None:
    _checker.rows(key, value, slot_mapping)
    _checker.caches(key_cache, value_cache, _DTYPES)
    _checker.fits(key, value, key_cache, value_cache)
    scale_caches = {"k_scale_cache": k_scale_cache, "v_scale_cache": v_scale_cache}
    for argument, scale_cache in scale_caches.items():
        _checker.layout(argument, scale_cache, "[N, P, Hkv]", (torch.float32,))
        expected = tuple(key_cache.shape[:3])
        ok = tuple(scale_cache.shape) == expected
        _checker.require(ok, argument, f"[N, P, Hkv] = {expected} like key_cache", scale_cache)
    _checker.same_device(key.device, **scale_caches)


def _check_indices(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    k_scale_cache: Tensor,
    v_scale_cache: Tensor,
    slot_mapping: Tensor,
    *,
    wrap: bool = False,
) -> None:
    _checker.slots(slot_mapping, key_cache.shape[0] * key_cache.shape[1], wrap)


define(
    "reshape_and_cache_dynamic(Tensor key, Tensor value, Tensor(a!) key_cache, "
    "Tensor(b!) value_cache, Tensor(c!) k_scale_cache, Tensor(d!) v_scale_cache, "
    "Tensor slot_mapping, *, bool wrap=False) -> ()",
    check=_check,
    check_indices=_check_indices,
)
