"""tkv::merge_attention_states: attention over two sets of keys from attention over each."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_tkv.ops.checks import Checker
from torch_tkv.ops.library import define
from torch_tkv.ops.paged_attention_lse import AttentionState

_checker = Checker("merge_attention_states")


def merge_attention_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> AttentionState:
    """Return the attention over the keys of two states, which have none in common.

    With `lse = log(exp(lse_a) + exp(lse_b))`, `out = exp(lse_a - lse) * out_a + exp(lse_b - lse) *
    out_b`. A side whose lse is -inf saw no key: the other one comes back bit for bit, whatever the
    first one's out holds; where both are -inf, `out` is zeros and `lse` -inf.

    Args:
        out_a: [T, Hq, Dv], float32, float16 or bfloat16; any strides whose last is 1.
        lse_a: float32 [T, Hq], natural logarithms; any strides.
        out_b: the other state's out, of out_a's shape and dtype, with strides of its own.
        lse_b: the other state's lse.

    Returns:
        AttentionState: `out` [T, Hq, Dv] in out_a's dtype, computed in float32 and rounded once,
        and `lse` [T, Hq] float32.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes, strides or devices do not fit together.
        NotImplementedError: autograd would record the call.
    """
    out, lse = torch.ops.tkv.merge_attention_states(out_a, lse_a, out_b, lse_b)
    return AttentionState(out, lse)


def _check(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    require = _checker.require
    _checker.floats("out_a", out_a, "[T, Hq, Dv]")
    _checker.layout("out_b", out_b, "[T, Hq, Dv]", (out_a.dtype,))
    _checker.floats("out_b", out_b, "[T, Hq, Dv]")
    ok = out_b.shape == out_a.shape
    require(ok, "out_b", f"[T, Hq, Dv] = {tuple(out_a.shape)} like out_a", out_b)
    expected = tuple(out_a.shape[:2])
    for argument, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        _checker.layout(argument, lse, "[T, Hq]", (torch.float32,))
        ok = tuple(lse.shape) == expected
        require(ok, argument, f"[T, Hq] = {expected} like out_a", lse)
    _checker.same_device(out_a.device, lse_a=lse_a, out_b=out_b, lse_b=lse_b)


def _check_indices(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    pass


def _fake(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


define(
    "merge_attention_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) "
    "-> (Tensor, Tensor)",
    check=_check,
    check_indices=_check_indices,
    fake=_fake,
)
