"""Spellings of rotary embeddings and of norms before them, as models have them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Each rotates x [..., D] by angles [..., D / 2], which broadcast against x but for the last
# dimension. Those of `PARTIAL` rotate the first half of x.
Form = Callable[[Tensor, Tensor], Tensor]


def rotate_half(x: Tensor) -> Tensor:
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-second, first), -1)


def halves(x: Tensor, angles: Tensor) -> Tensor:
    angles = torch.cat((angles, angles), -1)
    return x * angles.cos().to(x.dtype) + rotate_half(x) * angles.sin().to(x.dtype)


def halves_in_float(x: Tensor, angles: Tensor) -> Tensor:
    return halves(x.float(), angles).to(x.dtype)


def chunks(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def one_table(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = torch.cat((angles.cos(), angles.sin()), -1).to(x.dtype).chunk(2, -1)
    first, second = x.split(x.shape[-1] // 2, -1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)


def opposite(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = angles.cos(), angles.sin()
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), -1).type_as(x)


def every_two(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = (t.to(x.dtype).repeat_interleave(2, -1) for t in (angles.cos(), angles.sin()))
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cos + turned * sin


def stacked(x: Tensor, angles: Tensor) -> Tensor:
    table = torch.stack((angles.cos(), angles.sin()), -1)
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    cos, sin = table[..., 0], table[..., 1]
    rotated = (
        pairs[..., 0] * cos - pairs[..., 1] * sin,
        pairs[..., 1] * cos + pairs[..., 0] * sin,
    )
    return torch.stack(rotated, -1).flatten(-2).type_as(x)


def complex_numbers(x: Tensor, angles: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2).type_as(x)


def partial(x: Tensor, angles: Tensor) -> Tensor:
    size = x.shape[-1] // 2
    return torch.cat((halves(x[..., :size], angles[..., : size // 2]), x[..., size:]), -1)


def partial_every_two(x: Tensor, angles: Tensor) -> Tensor:
    size = x.shape[-1] // 2
    return torch.cat((every_two(x[..., :size], angles[..., : size // 2]), x[..., size:]), -1)


FORMS: tuple[Form, ...] = (
    halves,
    halves_in_float,
    chunks,
    one_table,
    opposite,
    every_two,
    stacked,
    complex_numbers,
    partial,
    partial_every_two,
)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm as in Llama and Qwen3."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * wide.to(x.dtype)


def norm_plus_one(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm as in Gemma."""
    wide = x.float()
    wide = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-6)
    return (wide * (1.0 + weight.float())).type_as(x)


def torch_norm(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, 1e-6)


NORMS = (norm, norm_plus_one, torch_norm)
