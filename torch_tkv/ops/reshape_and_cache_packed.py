"""tkv::reshape_and_cache_packed: write keys and values into one cache that holds both."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_tkv.ops.checks import CACHE_DTYPES, Checker
from torch_tkv.ops.library import define
from torch_tkv.reference.reshape_and_cache_packed import unpack

_SHAPES = {0: "[2, N, P, Hkv, D]", 1: "[N, 2, P, Hkv, D]", -1: "[N, P, Hkv, D + Dv]"}

_checker = Checker("reshape_and_cache_packed")


def reshape_and_cache_packed(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    kv_dim: int = 0,
    wrap: bool = False,
) -> None:
    """Write keys and values into the slots of one cache that holds both, in place.

    The same as `reshape_and_cache` on the two views of `kv_cache`, which the operator makes itself:
    with one mutable argument, the input of the graph, stock `torch.compile` neither copies the
    cache nor, as with two views of one storage on some versions, writes to the wrong rows.

    Args:
        key: [T, Hkv, D], float32, float16 or bfloat16; any strides whose last is 1.
        value: [T, Hkv, Dv] in key's dtype, with strides of its own.
        kv_cache: float32, float16, bfloat16, float8_e4m3fn or float8_e5m2; any strides whose last
            is 1; [2, N, P, Hkv, D], [N, 2, P, Hkv, D] or [N, P, Hkv, D + Dv], as `kv_dim` says.
        slot_mapping: [<= T], int32 or int64; `slot = block * P + offset`, negative to skip.
        k_scale: float32 [] or [Hkv]; keys are divided by it in float32. None means 1.
        v_scale: the same for values.
        kv_dim: the dimension that holds keys and values: 0, 1 or -1.
        wrap: a slot in [-N * P, -1] counts from the end of the cache, as in eager indexing,
            instead of being skipped.

    Raises:
        TypeError: a dtype is none of the above, or float8_e4m3fn on a GPU that lacks it.
        ValueError: shapes, strides or devices do not fit together.
        IndexError: on CPU, a slot lies outside the cache. On a GPU such a slot is dropped, and
            TKV_DEBUG=1 makes it a device assert.
        NotImplementedError: autograd would record the call.
    """
    torch.ops.tkv.reshape_and_cache_packed(
        key, value, kv_cache, slot_mapping, k_scale, v_scale, kv_dim=kv_dim, wrap=wrap
    )


def _check(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    kv_dim: int = 0,
    wrap: bool = False,
) -> None:
    require = _checker.require
    require(kv_dim in _SHAPES, "kv_dim", "0, 1 or -1", kv_dim)
    _checker.rows(key, value, slot_mapping, k_scale, v_scale)
    _checker.floats("kv_cache", kv_cache, _SHAPES[kv_dim], CACHE_DTYPES)
    _checker.same_device(key.device, kv_cache=kv_cache)
    heads, head_size = key.shape[1:]
    value_size = value.shape[2]
    if kv_dim == -1:
        expected = heads, head_size + value_size
    else:
        require(value_size == head_size, "value", f"[T, Hkv, D = {head_size}] like key", value)
        require(kv_cache.shape[kv_dim] == 2, "kv_cache", _SHAPES[kv_dim], kv_cache)
        expected = heads, head_size
    nonempty = min(heads, head_size, value_size, kv_cache.shape[-3]) > 0
    ok = tuple(kv_cache.shape[-2:]) == expected and nonempty
    like = f"{_SHAPES[kv_dim]} that ends in {expected} like key and value, with P, D and Dv > 0"
    require(ok, "kv_cache", like, kv_cache)


def _check_indices(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    kv_dim: int = 0,
    wrap: bool = False,
) -> None:
    key_cache, _ = unpack(kv_cache, kv_dim, key.shape[2])
    _checker.slots(slot_mapping, key_cache.shape[0] * key_cache.shape[1], wrap)


define(
    "reshape_and_cache_packed(Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor slot_mapping, "
    "Tensor? k_scale=None, Tensor? v_scale=None, *, int kv_dim=0, bool wrap=False) -> ()",
    check=_check,
    check_indices=_check_indices,
)
