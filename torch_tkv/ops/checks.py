"""Argument checks shared by the operators.

Every message names the function, the argument, the requirement and what came. Checks of shapes,
strides, dtypes and devices serve real and fake tensors alike.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
CACHE_DTYPES = (*FLOAT_DTYPES, *FP8_DTYPES)
INDEX_DTYPES = (torch.int32, torch.int64)


class Checker:
    """Raises errors in the name of one operator."""

    def __init__(self, function: str) -> None:
        self.function = function

    def require(
        self,
        ok: bool,
        argument: str,
        requirement: str,
        got: object,
        error: type[Exception] = ValueError,
    ) -> None:
        """Raise `error`, saying what `argument` must be and what it is, unless `ok`."""
        if not ok:
            text = f"{self.function}: {argument} must be {requirement}, got {_describe(got)}"
            raise error(text)

    def layout(
        self, argument: str, tensor: Tensor, shape: str, dtypes: Sequence[torch.dtype]
    ) -> None:
        """Require one of `dtypes` and the rank of `shape`, such as "[T, Hkv, D]"."""
        names = " or ".join(map(_dtype_name, dtypes))
        ok = tensor.dtype in dtypes
        self.require(ok, argument, f"{names} {shape}", tensor, TypeError)
        self.require(tensor.dim() == shape.count(",") + 1, argument, f"{names} {shape}", tensor)
        if tensor.dtype == torch.float8_e4m3fn:
            requirement = "of another dtype on a GPU before sm_89: it has no float8_e4m3fn"
            self.require(has_e4m3fn(tensor.device), argument, requirement, tensor, TypeError)

    def floats(
        self,
        argument: str,
        tensor: Tensor,
        shape: str,
        dtypes: Sequence[torch.dtype] = FLOAT_DTYPES,
    ) -> None:
        """Require a tensor of `shape` and one of `dtypes` with a last stride of 1."""
        self.layout(argument, tensor, shape, dtypes)
        ok = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
        self.require(ok, argument, "of last stride 1", f"strides {tuple(tensor.stride())}")

    def indices(self, argument: str, tensor: Tensor, shape: str) -> None:
        """Require an int32 or int64 tensor of `shape`."""
        self.layout(argument, tensor, shape, INDEX_DTYPES)

    def caches(
        self,
        key_cache: Tensor,
        value_cache: Tensor,
        dtypes: Sequence[torch.dtype] = FLOAT_DTYPES,
    ) -> None:
        """Require K and V caches that agree in blocks, block size and heads."""
        self.floats("key_cache", key_cache, "[N, P, Hkv, D]", dtypes)
        self.floats("value_cache", value_cache, "[N, P, Hkv, Dv]", dtypes)
        blocks, block_size, heads, head_size = key_cache.shape
        ok = block_size > 0 and heads > 0 and head_size > 0 and value_cache.shape[3] > 0
        self.require(ok, "key_cache", "[N, P, Hkv, D] with P, Hkv, D and Dv > 0", key_cache)
        ok = value_cache.shape[:3] == key_cache.shape[:3]
        like = f"[N = {blocks}, P = {block_size}, Hkv = {heads}, Dv] like key_cache"
        self.require(ok, "value_cache", like, value_cache)

    def rows(
        self,
        key: Tensor,
        value: Tensor,
        slot_mapping: Tensor,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None:
        """Require the rows of a cache write, their slots and their scales to fit together."""
        self.floats("key", key, "[T, Hkv, D]")
        self.layout("value", value, "[T, Hkv, Dv]", (key.dtype,))
        self.floats("value", value, "[T, Hkv, Dv]")
        self.indices("slot_mapping", slot_mapping, "[T]")
        tokens, heads, _ = key.shape
        ok = value.shape[:2] == key.shape[:2]
        self.require(ok, "value", f"[T = {tokens}, Hkv = {heads}, Dv] like key", value)
        ok = slot_mapping.shape[0] <= tokens
        no_longer = f"no longer than the {tokens} tokens of key"
        self.require(ok, "slot_mapping", no_longer, slot_mapping)
        self.scale("k_scale", k_scale, heads)
        self.scale("v_scale", v_scale, heads)
        others = {"value": value, "slot_mapping": slot_mapping}
        self.same_device(key.device, **others, k_scale=k_scale, v_scale=v_scale)

    def fits(self, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
        """Require caches that take the rows of `key` and `value`."""
        self.same_device(key.device, key_cache=key_cache, value_cache=value_cache)
        heads, head_size = key.shape[1:]
        ok = key_cache.shape[2:] == key.shape[1:]
        like = f"[N, P, Hkv = {heads}, D = {head_size}] like key"
        self.require(ok, "key_cache", like, key_cache)
        ok = value_cache.shape[3] == value.shape[2]
        like = f"[N, P, Hkv, Dv = {value.shape[2]}] like value"
        self.require(ok, "value_cache", like, value_cache)

    def scale(self, argument: str, scale: Tensor | None, heads: int | None = None) -> None:
        """Require None or a float32 scale, one or, where there are `heads`, one a head."""
        if scale is not None:
            shape = "[]" if heads is None else f"[] or [Hkv = {heads}]"
            ok = scale.dtype == torch.float32
            self.require(ok, argument, f"float32 {shape}", scale, TypeError)
            ok = scale.dim() == 0 or tuple(scale.shape) == (heads,)
            self.require(ok, argument, f"float32 {shape}", scale)

    def same_device(self, device: torch.device, **tensors: Tensor | None) -> None:
        """Require every tensor that is given on `device`."""
        for argument, tensor in tensors.items():
            if tensor is not None:
                ok = tensor.device == device
                self.require(ok, argument, f"on {device} like the first", f"one on {tensor.device}")

    def slots(self, slot_mapping: Tensor, num_slots: int, wrap: bool) -> None:
        """Require, by value, slots of a cache of `num_slots` or negative ones."""
        outside = slot_mapping >= num_slots
        if wrap:
            outside |= slot_mapping < -num_slots
        if outside.any():
            token = int(outside.nonzero()[0])
            got = f"{int(slot_mapping[token])} for token {token}"
            self.require(False, "slot_mapping", f"within {num_slots} slots", got, IndexError)


def refuse_autograd(function: str, args: Sequence[object]) -> None:
    """Raise where autograd would record the call: the operators have no backward."""
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
        raise NotImplementedError(
            f"{function}: there is no backward; detach the inputs, or call it under "
            "torch.no_grad() or torch.inference_mode()"
        )


@functools.cache
def has_e4m3fn(device: torch.device) -> bool:
    """Return whether kernels can convert to and from float8_e4m3fn on `device`."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return True
    return torch.cuda.get_device_capability(device) >= (8, 9)


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{_dtype_name(value.dtype)} {tuple(value.shape)}"
    return str(value)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
