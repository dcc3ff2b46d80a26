"""Reference of tkv::paged_attention_lse: the specification, CPU implementation and oracle."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torch_tkv.reference.paged_attention import Arguments, attend


def paged_attention_lse(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Return the attention [T, Hq, Dv] and the logs [T, Hq] of the softmax's denominators.

    Takes the `Arguments` of paged_attention but for `output_scale`; indices must be in range.
    """
    arguments = Arguments(*args, **kwargs)
    out, lse = attend(arguments)
    return out.to(arguments.query.dtype), lse
