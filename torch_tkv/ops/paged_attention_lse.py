"""tkv::paged_attention_lse: paged attention that can be merged with more of the same."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_tkv.ops.library import define
from torch_tkv.ops.paged_attention import OPTIONS, TENSORS, AttentionChecker, fake_out


class AttentionState(NamedTuple):
    """Attention over some keys, and what it takes to add more keys to it."""

    out: Tensor  # [T, Hq, Dv]
    lse: Tensor  # float32 [T, Hq], natural logarithm of the softmax's denominator


def paged_attention_lse(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    query_bias: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_scale_cache: Tensor | None = None,
    v_scale_cache: Tensor | None = None,
) -> AttentionState:
    """Attend as `paged_attention` does, and return the softmax's denominators too.

    States over disjoint keys are put together by `merge_attention_states`: a shared prefix, which
    its queries see with `causal=False`, and the rest of each sequence, or the shards of a context.
    A sink is one more term of the denominator, so it is given to one of the states only.

    Args and errors are those of `torch_tkv.paged_attention`; there is no output_scale.

    Returns:
        AttentionState: `out` [T, Hq, Dv] in query's dtype, and `lse` [T, Hq] float32, the natural
        logarithm of the softmax's denominator, sink included. Where a query sees no key they are
        zeros and -inf.
    """
    out, lse = torch.ops.tkv.paged_attention_lse(
        query,
        key_cache,
        value_cache,
        block_table,
        seq_lens,
        query_start_loc,
        query.shape[-1] ** -0.5 if scale is None else scale,
        k_scale,
        v_scale,
        k_scale_cache,
        v_scale_cache,
        alibi_slopes,
        sinks,
        query_bias,
        causal=causal,
        window=window,
        softcap=softcap,
    )
    return AttentionState(out, lse)


def _fake(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    out = fake_out(*args, **kwargs)
    return out, out.new_empty(out.shape[:2], dtype=torch.float32)


_checker = AttentionChecker("paged_attention_lse")

define(
    f"paged_attention_lse({TENSORS}, *, {OPTIONS}) -> (Tensor, Tensor)",
    check=_checker.check,
    check_indices=_checker.check_indices,
    fake=_fake,
)
