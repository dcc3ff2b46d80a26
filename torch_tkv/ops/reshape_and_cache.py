"""tkv::reshape_and_cache: write keys and values into the slots of a paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_tkv.ops.checks import Checker
from torch_tkv.ops.library import define

_checker = Checker("reshape_and_cache")


def reshape_and_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    wrap: bool = False,
) -> None:
    """Write keys and values into the slots of a paged cache, in place.

    Token `t` goes to `cache[slot // P, slot % P]` with `slot = slot_mapping[t]`. Tokens past the
    end of `slot_mapping` and tokens with a negative slot are not written. Where two tokens share a
    slot, one of them is written, whole.

    Args:
        key: [T, Hkv, D], float32, float16 or bfloat16; any strides whose last is 1.
        value: [T, Hkv, Dv] in key's dtype, with strides of its own.
        key_cache: [N, P, Hkv, D], float32, float16 or bfloat16; any strides whose last is 1: NHD,
            HND and packed layouts alike. Keys are rounded once to its dtype.
        value_cache: [N, P, Hkv, Dv], with strides and a dtype of its own.
        slot_mapping: [<= T], int32 or int64; `slot = block * P + offset`.
        wrap: a slot in [-N * P, -1] counts from the end of the cache, as in eager indexing,
            instead of being skipped.

    Raises:
        TypeError: a dtype is none of the above.
        ValueError: shapes, strides or devices do not fit together.
        IndexError: on CPU, a slot lies outside the cache. On a GPU such a slot is dropped, and
            TKV_DEBUG=1 makes it a device assert.
        NotImplementedError: autograd would record the call.
    """
    torch.ops.tkv.reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, wrap=wrap)


def _check(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    wrap: bool = False,
) -> None:
    require = _checker.require
    _checker.floats("key", key, "[T, Hkv, D]")
    _checker.layout("value", value, "[T, Hkv, Dv]", (key.dtype,))
    _checker.floats("value", value, "[T, Hkv, Dv]")
    _checker.caches(key_cache, value_cache)
    _checker.indices("slot_mapping", slot_mapping, "[T]")
    _checker.same_device(
        key.device,
        value=value,
        key_cache=key_cache,
        value_cache=value_cache,
        slot_mapping=slot_mapping,
    )
    tokens, heads, head_size = key.shape
    value_size = value.shape[2]
    ok = value.shape[:2] == key.shape[:2]
    require(ok, "value", f"[T = {tokens}, Hkv = {heads}, Dv] like key", value)
    ok = key_cache.shape[2:] == key.shape[1:]
    require(ok, "key_cache", f"[N, P, Hkv = {heads}, D = {head_size}] like key", key_cache)
    ok = value_cache.shape[3] == value_size
    require(ok, "value_cache", f"[N, P, Hkv, Dv = {value_size}] like value", value_cache)
    ok = slot_mapping.shape[0] <= tokens
    require(ok, "slot_mapping", f"no longer than the {tokens} tokens of key", slot_mapping)


def _check_indices(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    wrap: bool = False,
) -> None:
    num_slots = key_cache.shape[0] * key_cache.shape[1]
    outside = slot_mapping >= num_slots
    if wrap:
        outside |= slot_mapping < -num_slots
    if outside.any():
        token = int(outside.nonzero()[0])
        got = f"{int(slot_mapping[token])} for token {token}"
        _checker.require(False, "slot_mapping", f"within {num_slots} slots", got, IndexError)


def _fake(*args: object, **kwargs: object) -> None:
    return None


define(
    "reshape_and_cache(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor slot_mapping, *, bool wrap=False) -> ()",
    check=_check,
    check_indices=_check_indices,
    fake=_fake,
)
