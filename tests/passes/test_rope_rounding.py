"""In bfloat16 the fused operator differs from eager PyTorch no more than Inductor does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from compiled import post_grad_only
from rope_forms import halves, norm, rotate_half
from torch import Tensor
from torch._inductor import config

from torch_tkv.passes.pipeline import Pipeline

T, H, D, P = 64, 8, 64, 16
Step = Callable[..., Tensor]


def given(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate by a cos and a sin that were rounded before."""
    cos, sin = angles.unbind(0)
    return x * cos + rotate_half(x) * sin


def normed(rotate: Callable[..., Tensor], x: Tensor, angles: Tensor) -> Tensor:
    return rotate(norm(x, torch.linspace(0.8, 1.2, D).to(x.dtype)), angles)


def compare(rotate: Callable[[Tensor, Tensor], Tensor]) -> list[tuple[Tensor, ...]]:
    """Return query and keys by eager PyTorch, by Inductor, and by the fused operator."""

    def step(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, angles: Tensor, s: Tensor) -> Tensor:
        kc.view(-1, H, D)[s] = rotate(k, angles)
        vc.view(-1, H, D)[s] = k
        return rotate(q, angles)

    def run(step: Step) -> tuple[Tensor, Tensor]:
        caches = [torch.zeros(T // P, P, H, D).bfloat16() for _ in range(2)]
        return step(*caches, q, k, angles, torch.arange(T)), caches[0]

    torch.manual_seed(0)
    q, k = torch.randn(2, T, H, D).bfloat16()
    angles = (torch.arange(T)[:, None] / 10000 ** (torch.arange(D // 2) / (D // 2)))[:, None]
    if rotate is not halves:
        angles = torch.cat((angles, angles), -1)
        angles = torch.stack((angles.cos(), angles.sin())).bfloat16()
    eager = run(step)
    with config.patch(post_grad_custom_post_pass=Pipeline(rope=False)):
        stock = run(torch.compile(step))
    torch._dynamo.reset()
    with config.patch(post_grad_custom_post_pass=(fusing := Pipeline())):
        fused = run(torch.compile(step, backend=post_grad_only))
    assert fusing.matched == 1
    return [*zip(eager, stock, fused, strict=True)]


def difference(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).abs().mean())


def test_rope_by_a_given_cos_and_sin_is_bit_equal_to_what_inductor_computes() -> None:
    for eager, stock, fused in compare(given):
        assert torch.equal(stock, fused)
        assert difference(fused, eager) > 0


def test_rope_by_angles_of_the_graph_is_nearer_to_eager_than_what_inductor_computes() -> None:
    # Inductor computes cos and sin in the same kernel, and does not round them to bfloat16.
    for eager, stock, fused in compare(halves):
        assert difference(fused, eager) < difference(stock, eager)


def test_norm_and_rope_are_as_near_to_eager_as_what_inductor_computes() -> None:
    for eager, stock, fused in compare(lambda x, angles: normed(given, x, angles)):
        assert difference(fused, eager) < difference(stock, eager)
