"""Reference of tkv::merge_attention_states: the specification, CPU implementation and oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_attention_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the attention [T, Hq, Dv] over the keys of both states, and its log-sum-exp [T, Hq].

    Args and meaning are those of `torch_tkv.merge_attention_states`. Computes in float32, or in
    float64 where the inputs are.
    """
    out = _share(out_a, lse_a, lse_b) + _share(out_b, lse_b, lse_a)
    return out.to(out_a.dtype).contiguous(), torch.logaddexp(lse_a, lse_b).contiguous()


def _share(out: Tensor, lse: Tensor, other: Tensor) -> Tensor:
    """Return what one state adds to the merged one: nothing where it saw no key."""
    weight = torch.sigmoid(lse - other)[..., None]
    return (weight * out).where(lse[..., None] != -torch.inf, 0.0)
