"""What looks like RoPE before a cache write, but is none or cannot move, stays, and is told why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compiled import Compiled, run_compiled
from rope_forms import chunks, complex_numbers, halves, norm, rotate_half
from torch import Tensor

import torch_tkv
from torch_tkv.passes.pipeline import Pipeline
from torch_tkv.passes.report import report
from torch_tkv.passes.rope_cache_write import fuse_rope

N, P, H, D, T = 7, 4, 3, 16, 5
Heads = tuple[Tensor, Tensor, Tensor]
Program = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Heads]


def query_is_not_rotated(q: Tensor, k: Tensor, v: Tensor, a: Tensor, w: Tensor) -> Heads:
    return q + 1, halves(k, a), v


def query_is_rotated_otherwise(q: Tensor, k: Tensor, v: Tensor, a: Tensor, w: Tensor) -> Heads:
    return halves(q, a * 2), halves(k, a), v


def query_is_paired_otherwise(q: Tensor, k: Tensor, v: Tensor, a: Tensor, w: Tensor) -> Heads:
    return complex_numbers(q, a), chunks(k, a), v


def query_has_other_tokens(q: Tensor, k: Tensor, v: Tensor, a: Tensor, w: Tensor) -> Heads:
    return halves(q[:1], a[:1]), halves(k, a[:1]), v


def key_is_scaled(q: Tensor, k: Tensor, v: Tensor, a: Tensor, w: Tensor) -> Heads:
    return halves(q, a), halves(k, a) * 0.5, v


def key_is_normed_after_rope(q: Tensor, k: Tensor, v: Tensor, a: Tensor, w: Tensor) -> Heads:
    return norm(halves(q, a), w[0]), norm(halves(k, a), w[1]), v


def norm_without_rope(q: Tensor, k: Tensor, v: Tensor, a: Tensor, w: Tensor) -> Heads:
    return norm(q, w.amax(0)), norm(k, w.amin(0)), v


def last_elements_are_rotated(q: Tensor, k: Tensor, v: Tensor, a: Tensor, w: Tensor) -> Heads:
    def turn(x: Tensor) -> Tensor:
        return torch.cat((x[..., :8], halves(x[..., 8:], a[..., :4])), -1)

    return turn(q), turn(k), v


def first_token_is_not_rotated(q: Tensor, k: Tensor, v: Tensor, a: Tensor, w: Tensor) -> Heads:
    return halves(q, a), torch.cat((k[:1], halves(k[1:], a[1:]))), v


def first_head_is_not_rotated(q: Tensor, k: Tensor, v: Tensor, a: Tensor, w: Tensor) -> Heads:
    return halves(q, a), torch.cat((k[:, :1], halves(k[:, 1:], a)), 1), v


def angles_of_each_head(q: Tensor, k: Tensor, v: Tensor, a: Tensor, w: Tensor) -> Heads:
    a = a * torch.arange(1, H + 1)[:, None]
    return halves(q, a), halves(k, a), v


def both_signs_are_plus(q: Tensor, k: Tensor, v: Tensor, a: Tensor, w: Tensor) -> Heads:
    cos, sin = a.cos(), a.sin()

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos + second * sin, second * cos + first * sin), -1)

    return turn(q), turn(k), v


def pairs_are_reversed(q: Tensor, k: Tensor, v: Tensor, a: Tensor, w: Tensor) -> Heads:
    angles = torch.cat((a, a), -1)

    def turn(x: Tensor) -> Tensor:
        first, second = x[..., ::2], x[..., 1::2]
        return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()

    return turn(q), turn(k), v


def sine_twice(q: Tensor, k: Tensor, v: Tensor, a: Tensor, w: Tensor) -> Heads:
    angles = torch.cat((a, a), -1)
    turn = lambda x: x * angles.cos() + 2 * rotate_half(x) * angles.sin()  # noqa: E731
    return turn(q), turn(k), v


def one_is_added_to_the_real_parts(q: Tensor, k: Tensor, v: Tensor, a: Tensor, w: Tensor) -> Heads:
    def turn(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(T, H, -1, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(a), a) + 1).flatten(-2)

    return turn(q), turn(k), v


def in_double(q: Tensor, k: Tensor, v: Tensor, a: Tensor, w: Tensor) -> Heads:
    return halves(q.double(), a).float(), halves(k.double(), a).float(), v


def in_bfloat16(q: Tensor, k: Tensor, v: Tensor, a: Tensor, w: Tensor) -> Heads:
    return halves(q.bfloat16(), a).float(), halves(k.bfloat16(), a).float(), v


def value_from_the_rotated_query(q: Tensor, k: Tensor, v: Tensor, a: Tensor, w: Tensor) -> Heads:
    q = halves(q, a)
    return q, halves(k, a), v + q[:, :1].amax()


NOT_ROPE = "RoPE apart: the key is computed in another way than rotary embeddings are"
NO_QUERY = "RoPE apart: no query of the same dtype is rotated by the same cos and sin"
CHANGED = "RoPE apart: the key is changed after its rotation"
PART = "RoPE apart: the rotated part and the rest of a head are not the two ends of one tensor"
REASONS: dict[Program, str] = {
    query_is_not_rotated: NO_QUERY,
    query_is_rotated_otherwise: NO_QUERY,
    query_is_paired_otherwise: NO_QUERY,
    query_has_other_tokens: NO_QUERY,
    key_is_scaled: CHANGED,
    key_is_normed_after_rope: CHANGED,
    first_token_is_not_rotated: CHANGED,
    first_head_is_not_rotated: CHANGED,
    last_elements_are_rotated: PART,
    angles_of_each_head: "RoPE apart: cos and sin differ by head",
    both_signs_are_plus: NOT_ROPE,
    pairs_are_reversed: NOT_ROPE,
    sine_twice: NOT_ROPE,
    one_is_added_to_the_real_parts: NOT_ROPE,
    in_double: "RoPE apart: the key is rotated in torch.float64 and written in torch.float32",
    in_bfloat16: "RoPE apart: the key is rotated in torch.bfloat16 and written in torch.float32",
    norm_without_rope: "norm apart: operators norm only what they rotate too, and the key is not",
    value_from_the_rotated_query: "RoPE apart: the rotated query is read before the cache can be",
}


def run(program: Program) -> Compiled:
    """Run a program that makes q, k and v of projections, writes k and v, and returns q."""

    def step(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        angles, weights, slots = rest
        q, k, v = program(q, k, v, angles, weights)
        kc.view(-1, H, D)[slots] = k
        vc.view(-1, H, D)[slots] = v
        return q

    caches = [torch.randn(N, P, H, D) for _ in range(2)]
    q, k, v = torch.randn(3, T, H, D)
    angles = torch.arange(T).view(T, 1, 1) / 100 ** (torch.arange(D // 2) / D)
    inputs = (q, k, v, angles, torch.randn(2, D), torch.randperm(N * P)[:T])
    return run_compiled(step, caches, *inputs, generate=False, rtol=1e-6)


@pytest.mark.parametrize("program", REASONS, ids=lambda program: program.__name__)
def test_a_near_miss_is_written_as_before_and_the_reason_is_told(program: Program) -> None:
    text = run(program).text
    assert text.count("tkv.") == text.count("tkv.reshape_and_cache(") == 1
    assert f"fused: cache write ({REASONS[program]}" in str(report())


def test_a_key_without_rope_gets_no_reason() -> None:
    run(lambda q, k, v, a, w: (halves(q, a), k, v))
    assert str(report()).endswith("fused: cache write\n1 of 1 layers: cache write fused")


def other_eps(q: Tensor, k: Tensor, v: Tensor, a: Tensor, w: Tensor) -> Heads:
    k = torch.nn.functional.rms_norm(k, (D,), w[1], 1e-2)
    return halves(norm(q, w[0]), a), halves(k, a), v


def query_only(q: Tensor, k: Tensor, v: Tensor, a: Tensor, w: Tensor) -> Heads:
    return halves(norm(q, w[0]), a), halves(k, a), v


def over_all_heads(q: Tensor, k: Tensor, v: Tensor, a: Tensor, w: Tensor) -> Heads:
    q, k = (norm(x.flatten(1), w[0].repeat(H)).view_as(x) for x in (q, k))
    return halves(q, a), halves(k, a), v


def of_another_tensor(q: Tensor, k: Tensor, v: Tensor, a: Tensor, w: Tensor) -> Heads:
    scale = torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + 1e-6)
    return halves(q * scale * w[0], a), halves(k * scale * w[1], a), v


def weight_of_each_head(q: Tensor, k: Tensor, v: Tensor, a: Tensor, w: Tensor) -> Heads:
    weight = torch.outer(torch.arange(1, H + 1), w[0])
    return halves(norm(q, weight), a), halves(norm(k, weight), a), v


@pytest.mark.parametrize(
    "program",
    [other_eps, query_only, over_all_heads, of_another_tensor, weight_of_each_head],
    ids=lambda program: program.__name__,
)
def test_another_norm_stays_in_front_of_rope(program: Program) -> None:
    text = run(program).text
    assert text.count("tkv.") == text.count("tkv.rope_reshape_and_cache(") == 1
    assert "fused: RoPE + cache write" in str(report())


def test_a_norm_whose_eps_is_an_input_stays_in_front_and_is_told() -> None:
    def tensor_eps(q: Tensor, k: Tensor, v: Tensor, a: Tensor, w: Tensor) -> Heads:
        def norm(x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + w[0, 0].abs()) * w[1]

        return halves(norm(q), a), halves(norm(k), a), v

    assert run(tensor_eps).text.count("tkv.rope_reshape_and_cache(") == 1
    assert "fused: RoPE + cache write (QK norm apart: dynamic=True makes its eps" in str(report())


def test_a_rotated_key_that_is_read_elsewhere_is_rotated_for_its_readers_too() -> None:
    def prefill(q: Tensor, k: Tensor, v: Tensor, a: Tensor, w: Tensor) -> Heads:
        q, k = halves(q, a), halves(k, a)
        return (q.transpose(0, 1) @ k.permute(1, 2, 0)).softmax(-1), k, v

    assert run(prefill).text.count("tkv.rope_reshape_and_cache(") == 1
    why = "the key is rotated again for its other readers"
    assert f"fused: RoPE + cache write ({why})" in str(report())


def test_a_query_rotated_behind_the_write_is_rotated_by_it() -> None:
    def layers(kc: Tensor, vc: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        angles, slots = rest
        for layer in range(2):
            kc[layer].view(-1, H, D)[slots] = halves(k, angles)
            vc[layer].view(-1, H, D)[slots] = v
            q = halves(q, angles) * kc[layer].sum((0, 1)) + vc[layer].sum((0, 1))
            k, v = q + 1, q - 1
        return q

    caches = [torch.randn(2, N, P, H, D) for _ in range(2)]
    q, k, v = torch.randn(3, T, H, D)
    angles = torch.arange(T).view(T, 1, 1) / 100 ** (torch.arange(D // 2) / D)
    inputs = (q, k, v, angles, torch.randperm(N * P)[:T])
    result = run_compiled(layers, caches, *inputs, generate=False, rtol=1e-5)
    assert result.text.count("tkv.rope_reshape_and_cache(") == 2
    assert str(report()).endswith("2 of 2 layers: RoPE + cache write fused")


def test_the_option_leaves_rope_apart_and_is_part_of_the_cache_key() -> None:
    apart, fusing = (
        torch_tkv.inductor_options({"tkv.rope": rope})["post_grad_custom_post_pass"]
        for rope in (False, True)
    )
    assert {*fusing.passes} - {*apart.passes} == {fuse_rope}
    assert apart.uuid() != fusing.uuid() == Pipeline().uuid()
    with pytest.raises(ValueError, match=r'"tkv\.rope" must be True or False, got 1'):
        torch_tkv.inductor_options({"tkv.rope": 1})
