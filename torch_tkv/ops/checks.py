"""Argument checks shared by the operators.

Every message names the function, the argument, the requirement and what came. Checks of shapes,
strides, dtypes and devices serve real and fake tensors alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
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

    def floats(self, argument: str, tensor: Tensor, shape: str) -> None:
        """Require a float tensor of `shape` with a last stride of 1."""
        self.layout(argument, tensor, shape, FLOAT_DTYPES)
        ok = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
        self.require(ok, argument, "of last stride 1", f"strides {tuple(tensor.stride())}")

    def indices(self, argument: str, tensor: Tensor, shape: str) -> None:
        """Require an int32 or int64 tensor of `shape`."""
        self.layout(argument, tensor, shape, INDEX_DTYPES)

    def caches(self, key_cache: Tensor, value_cache: Tensor) -> None:
        """Require K and V caches that agree in blocks, block size and heads."""
        self.floats("key_cache", key_cache, "[N, P, Hkv, D]")
        self.floats("value_cache", value_cache, "[N, P, Hkv, Dv]")
        blocks, block_size, heads, head_size = key_cache.shape
        ok = block_size > 0 and heads > 0 and head_size > 0 and value_cache.shape[3] > 0
        self.require(ok, "key_cache", "[N, P, Hkv, D] with P, Hkv, D and Dv > 0", key_cache)
        ok = value_cache.shape[:3] == key_cache.shape[:3]
        like = f"[N = {blocks}, P = {block_size}, Hkv = {heads}, Dv] like key_cache"
        self.require(ok, "value_cache", like, value_cache)

    def same_device(self, device: torch.device, **tensors: Tensor) -> None:
        """Require every tensor on `device`."""
        for argument, tensor in tensors.items():
            ok = tensor.device == device
            self.require(ok, argument, f"on {device} like the first", f"one on {tensor.device}")


def refuse_autograd(function: str, args: Sequence[object]) -> None:
    """Raise where autograd would record the call: the operators have no backward."""
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
        raise NotImplementedError(
            f"{function}: there is no backward; detach the inputs, or call it under "
            "torch.no_grad() or torch.inference_mode()"
        )


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{_dtype_name(value.dtype)} {tuple(value.shape)}"
    return str(value)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
