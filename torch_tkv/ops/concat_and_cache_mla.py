"""tkv::concat_and_cache_mla: write the latent and rope parts of MLA into a paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_tkv.ops.checks import CACHE_DTYPES, Checker
from torch_tkv.ops.library import define

_checker = Checker("concat_and_cache_mla")


def concat_and_cache_mla(
    kv_c: Tensor,
    k_pe: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    scale: Tensor | None = None,
    *,
    wrap: bool = False,
) -> None:
    """Write the latent and rope parts of MLA side by side into a paged cache, in place.

    Token `t` goes to `kv_cache[slot // P, slot % P]` with `slot = slot_mapping[t]`. Tokens past the
    end of `slot_mapping` and tokens with a negative slot are not written. Where tokens share a
    slot, each of its elements is that of one of them.

    Args:
        kv_c: [T, R], float32, float16 or bfloat16; any strides whose last is 1.
        k_pe: [T, Pe] in kv_c's dtype, with strides of its own.
        kv_cache: [N, P, R + Pe], float32, float16, bfloat16, float8_e4m3fn or float8_e5m2; any
            strides whose last is 1. Rows are rounded once to its dtype; float8 saturates,
            infinities too, and keeps NaN.
        slot_mapping: [<= T], int32 or int64; `slot = block * P + offset`.
        scale: float32 []; both parts are divided by it in float32. None means 1.
        wrap: a slot in [-N * P, -1] counts from the end of the cache, as in eager indexing,
            instead of being skipped.

    Raises:
        TypeError: a dtype is none of the above, or float8_e4m3fn on a GPU that lacks it.
        ValueError: shapes, strides or devices do not fit together.
        IndexError: on CPU, a slot lies outside the cache. On a GPU such a slot is dropped, and
            TKV_DEBUG=1 makes it a device assert.
        NotImplementedError: autograd would record the call.
    """
    torch.ops.tkv.concat_and_cache_mla(kv_c, k_pe, kv_cache, slot_mapping, scale, wrap=wrap)


def _check(
    kv_c: Tensor,
    k_pe: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    scale: Tensor | None = None,
    *,
    wrap: bool = False,
) -> None:
    require = _checker.require
    _checker.floats("kv_c", kv_c, "[T, R]")
    _checker.layout("k_pe", k_pe, "[T, Pe]", (kv_c.dtype,))
    _checker.floats("k_pe", k_pe, "[T, Pe]")
    _checker.floats("kv_cache", kv_cache, "[N, P, R + Pe]", CACHE_DTYPES)
    _checker.indices("slot_mapping", slot_mapping, "[T]")
    _checker.scale("scale", scale)
    _checker.same_device(
        kv_c.device, k_pe=k_pe, kv_cache=kv_cache, slot_mapping=slot_mapping, scale=scale
    )
    tokens, rank = kv_c.shape
    ok = k_pe.shape[0] == tokens and min(rank, k_pe.shape[1]) > 0
    require(ok, "k_pe", f"[T = {tokens}, Pe] like kv_c, with R and Pe > 0", k_pe)
    size = rank + k_pe.shape[1]
    ok = kv_cache.shape[2] == size and kv_cache.shape[1] > 0
    require(ok, "kv_cache", f"[N, P > 0, R + Pe = {size}] like kv_c and k_pe", kv_cache)
    ok = slot_mapping.shape[0] <= tokens
    require(ok, "slot_mapping", f"no longer than the {tokens} tokens of kv_c", slot_mapping)


def _check_indices(
    kv_c: Tensor,
    k_pe: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    scale: Tensor | None = None,
    *,
    wrap: bool = False,
) -> None:
    _checker.slots(slot_mapping, kv_cache.shape[0] * kv_cache.shape[1], wrap)


define(
    "concat_and_cache_mla(Tensor kv_c, Tensor k_pe, Tensor(a!) kv_cache, Tensor slot_mapping, "
    "Tensor? scale=None, *, bool wrap=False) -> ()",
    check=_check,
    check_indices=_check_indices,
)
