"""Reference of tkv::rotary_embedding: the specification, the CPU implementation, the oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_embedding(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `query` [T, Hq, D] and `key` [T, Hkv, D], rotated.

    Args and meaning are those of `torch_tkv.rotary_embedding`; positions must lie in the table.
    Computes in float32, or in float64 where the inputs are, and rounds once.
    """
    rotary_dim = query.shape[-1] if rotary_dim is None else rotary_dim
    if positions is not None:
        cos, sin = cos[positions.long()], sin[positions.long()]
    cos, sin = (_widen(table, rotary_dim, interleaved)[:, None] for table in (cos, sin))
    return _rotate(query, cos, sin, interleaved), _rotate(key, cos, sin, interleaved)


def _widen(table: Tensor, rotary_dim: int, interleaved: bool) -> Tensor:
    """Return `table`, of full or half width, at full width: a column an element, not a pair."""
    if table.shape[-1] == rotary_dim:
        return table
    return table.repeat_interleave(2, -1) if interleaved else torch.cat((table, table), -1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first R of the D elements of every head; `cos` and `sin` are [T, 1, R]."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    rotary_dim = cos.shape[-1]
    rotated, rest = x.to(dtype).split((rotary_dim, x.shape[-1] - rotary_dim), -1)
    if interleaved:
        first, second = rotated.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((-second, first), -1).flatten(-2)
    else:
        first, second = rotated.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
    rotated = rotated * cos.to(dtype) + turned * sin.to(dtype)
    return torch.cat((rotated, rest), -1).to(x.dtype)
