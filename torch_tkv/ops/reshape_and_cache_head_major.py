"""tkv::reshape_and_cache_head_major: write keys and values into an x-packed cache."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_tkv.ops.checks import CACHE_DTYPES, Checker
from torch_tkv.ops.library import define

_checker = Checker("reshape_and_cache_head_major")


def reshape_and_cache_head_major(
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
    """Write keys and values into the slots of a paged cache with an x-packed layout, in place.

    The same as `reshape_and_cache` but for the layout: a block holds, head by head, its keys in
    chunks of x elements that lie side by side for all slots, and its values transposed.

    Args:
        key: [T, Hkv, D], float32, float16 or bfloat16; any strides whose last is 1.
        value: [T, Hkv, Dv] in key's dtype, with strides of its own.
        key_cache: [N, Hkv, D / x, P, x], float32, float16, bfloat16, float8_e4m3fn or float8_e5m2;
            any strides whose last is 1; any x that divides D.
        value_cache: [N, Hkv, Dv, P], with a dtype of its own; any strides.
        slot_mapping: [<= T], int32 or int64; `slot = block * P + offset`, negative to skip.
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
    torch.ops.tkv.reshape_and_cache_head_major(
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
    require = _checker.require
    _checker.rows(key, value, slot_mapping, k_scale, v_scale)
    _checker.floats("key_cache", key_cache, "[N, Hkv, D / x, P, x]", CACHE_DTYPES)
    _checker.layout("value_cache", value_cache, "[N, Hkv, Dv, P]", CACHE_DTYPES)
    _checker.same_device(key.device, key_cache=key_cache, value_cache=value_cache)
    heads, head_size = key.shape[1:]
    blocks, cache_heads, chunks, block_size, x = key_cache.shape
    ok = cache_heads == heads and chunks * x == head_size and min(chunks, block_size, heads) > 0
    like = f"[N, Hkv = {heads}, D / x, P > 0, x] with D = {head_size} > 0 like key"
    require(ok, "key_cache", like, key_cache)
    expected = blocks, heads, value.shape[2], block_size
    ok = tuple(value_cache.shape) == expected and value.shape[2] > 0
    like = f"[N, Hkv, Dv, P] = {expected} like key_cache and value, with Dv > 0"
    require(ok, "value_cache", like, value_cache)


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
    _checker.slots(slot_mapping, key_cache.shape[0] * key_cache.shape[3], wrap)


define(
    "reshape_and_cache_head_major(Tensor key, Tensor value, Tensor(a!) key_cache, "
    "Tensor(b!) value_cache, Tensor slot_mapping, Tensor? k_scale=None, Tensor? v_scale=None, *, "
    "bool wrap=False) -> ()",
    check=_check,
    check_indices=_check_indices,
)
