"""RoPE, and norms before it, become one operator with the cache write, in all their spellings."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compiled import Compiled, cache_sized, run_compiled
from expecttest import assert_expected_inline
from rope_forms import FORMS, NORMS, Form, chunks, halves, opposite, stacked
from torch import Tensor

from torch_tkv.passes.report import report

N, P, HQ, HKV, D, T = 7, 4, 4, 2, 16, 6
Layout = Callable[..., Tensor]
ROPE, NORMED = "tkv.rope_reshape_and_cache(", "tkv.qk_norm_rope_reshape_and_cache("
forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)


def make_inputs(tokens: int = T) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Return caches, and a packed projection, angles and slots of tokens."""
    caches = [torch.randn(N, P, HKV, D) for _ in range(2)]
    qkv = torch.randn(tokens, (HQ + 2 * HKV) * D)
    angles = torch.arange(tokens)[:, None] / 100 ** (torch.arange(D // 2) / D)
    return caches, (qkv, angles, torch.randperm(N * P)[:tokens])


def write(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    for cache, x in ((kc, k), (vc, v)):
        cache.view(-1, *x.shape[1:])[slots] = x


def flat(form: Form, kc: Tensor, vc: Tensor, qkv: Tensor, angles: Tensor, s: Tensor) -> Tensor:
    q, k, v = qkv.split((HQ * D, HKV * D, HKV * D), -1)
    k, v = k.view(-1, HKV, D), v.view(-1, HKV, D)
    write(kc, vc, form(k, angles[:, None]), v, s)
    return form(q.view(-1, HQ, D), angles[:, None])


def packed(form: Form, kc: Tensor, vc: Tensor, qkv: Tensor, angles: Tensor, s: Tensor) -> Tensor:
    q, k, v = qkv.view(-1, HQ + 2 * HKV, D).split((HQ, HKV, HKV), 1)
    q, k = form(q, angles[:, None]), form(k, angles[:, None])
    write(kc, vc, k, v, s)
    return q.flatten(1) + 1


def batched(form: Form, kc: Tensor, vc: Tensor, qkv: Tensor, angles: Tensor, s: Tensor) -> Tensor:
    """Two sequences of the same positions, heads before tokens, as in Hugging Face."""
    parts = qkv.view(2, -1, (HQ + 2 * HKV) * D).split((HQ * D, HKV * D, HKV * D), -1)
    q, k, v = (x.view(2, -1, x.shape[-1] // D, D).transpose(1, 2) for x in parts)
    angles = angles.view(2, -1, D // 2)[:1].unsqueeze(1)
    q, k = form(q, angles), form(k, angles)
    write(kc, vc, *(x.transpose(1, 2).reshape(-1, HKV, D) for x in (k, v)), s)
    return q @ q.mT


LAYOUTS = (flat, packed, batched)
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)


def run(form: Form, layout: Layout, tokens: int = T, *, dynamic: bool = False) -> Compiled:
    caches, inputs = make_inputs(tokens)
    if dynamic:
        for tensor in inputs:
            torch._dynamo.mark_dynamic(tensor, 0)

    def program(*args: Tensor) -> Tensor:
        return layout(form, *args)

    return run_compiled(program, caches, *inputs, generate=False, rtol=1e-6)


def assert_fused(form: Form, layout: Layout, op: str, kind: str, *, dynamic: bool) -> None:
    result = run(form, layout, dynamic=dynamic)
    assert result.matched == 1
    assert result.text.count("tkv.") == result.text.count(op) == 1
    left = ["neg"] if form is opposite else []
    assert [x for x in ("mul", "neg", "sub", "rsqrt") if f" {x}(" in result.text] == left
    assert report().as_dict()["kinds"] == {kind: 1}


@forms
@layouts
def test_rope_and_the_write_are_one_operator(form: Form, layout: Layout) -> None:
    assert_fused(form, layout, ROPE, "RoPE + cache write", dynamic=False)


@pytest.mark.parametrize(("form", "layout"), [*zip(FORMS, LAYOUTS * 4, strict=False)])
def test_any_number_of_tokens_is_rotated(form: Form, layout: Layout) -> None:
    assert_fused(form, layout, ROPE, "RoPE + cache write", dynamic=True)


@forms
def test_a_single_token_is_rotated_too(form: Form) -> None:
    assert ROPE in run(form, flat, tokens=1).text


@forms
def test_the_key_of_a_single_head_is_told_from_the_angles(form: Form) -> None:
    def program(kc: Tensor, vc: Tensor, qkv: Tensor, angles: Tensor, s: Tensor) -> Tensor:
        q, k, v = qkv.view(T, -1, D).split((HQ + 2 * HKV - 2, 1, 1), 1)
        write(kc, vc, form(k, angles[:, None]), v, s)
        return form(q, angles[:, None])

    _, inputs = make_inputs()
    caches = [torch.randn(N, P, 1, D) for _ in range(2)]
    assert ROPE in run_compiled(program, caches, *inputs, generate=False, rtol=1e-6).text


def normed(function: Form) -> Form:
    weights = {HQ: torch.randn(D), HKV: torch.randn(D)}
    return lambda x, angles: halves(function(x, weights[x.shape[1]]), angles)


def norm_by_power(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm as in Gemma 3n."""
    wide = x.float()
    normed = wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + 1e-6, -0.5)
    return (normed * weight.float()).type_as(x)


@pytest.mark.parametrize(
    "function", [*NORMS, norm_by_power], ids=lambda function: function.__name__
)
@layouts
def test_norms_of_heads_are_fused_with_rope(function: Form, layout: Layout) -> None:
    assert_fused(normed(function), layout, NORMED, "QK norm + RoPE + cache write", dynamic=False)


def of_a_stack(weights: Tensor, i: int) -> Tensor:
    return weights[i]


def of_columns(weights: Tensor, i: int) -> Tensor:
    return weights.view(D, 3)[:, i]


def of_one_vector(weights: Tensor, i: int) -> Tensor:
    return weights.flatten()[i + 1 :][:D]


@pytest.mark.parametrize(
    "take", [of_a_stack, of_columns, of_one_vector], ids=lambda take: take.__name__
)
def test_weights_of_norms_are_parts_of_tensors(take: Callable[[Tensor, int], Tensor]) -> None:
    weights = torch.randn(3, D)

    def form(x: Tensor, angles: Tensor) -> Tensor:
        return halves(norm_by_power(x, take(weights, x.shape[1] // HKV)), angles)

    assert_fused(form, flat, NORMED, "QK norm + RoPE + cache write", dynamic=False)


@pytest.mark.parametrize(("function", "layout"), [*zip(NORMS, LAYOUTS, strict=True)])
def test_norms_of_any_number_of_tokens_are_fused(function: Form, layout: Layout) -> None:
    assert_fused(normed(function), layout, NORMED, "QK norm + RoPE + cache write", dynamic=True)


def test_operands_are_views_of_projections_and_angles_have_a_row_for_each_token() -> None:
    text = run(stacked, flat).text
    assert_expected_inline(
        text[: text.index(", input")],
        """\
%0 = split_with_sizes(input0, [64, 32, 32], -1)
%1 = <built-in function getitem>(%0, 0)
%2 = <built-in function getitem>(%0, 1)
%3 = <built-in function getitem>(%0, 2)
%4 = unsqueeze(input1, 1)
%5 = cos(%4)
%6 = sin(%4)
%7 = reshape(%3, [-1, 2, 16])
%8 = reshape(%1, [6, 4, 16])
%9 = reshape(%2, [6, 2, 16])
%10 = reshape(%5, [6, 8])
%11 = reshape(%6, [6, 8])
%12 = tkv.rope_reshape_and_cache(%8, %9, %7, %10, %11, None""",
    )


def test_angles_that_sequences_share_are_expanded() -> None:
    text = run(chunks, batched).text
    assert_expected_inline(
        text[: text.index("%", text.index("tkv."))],
        """\
%0 = reshape(input0, [2, -1, 128])
%1 = split_with_sizes(%0, [64, 32, 32], -1)
%2 = <built-in function getitem>(%1, 0)
%3 = <built-in function getitem>(%1, 1)
%4 = <built-in function getitem>(%1, 2)
%5 = reshape(input1, [2, -1, 8])
%6 = slice(%5, 0, 0, 1)
%7 = unsqueeze(%6, 1)
%8 = cos(%7)
%9 = sin(%7)
%10 = reshape(%4, [2, -1, 2, 16])
%11 = reshape(%10, [6, 2, 16])
%12 = reshape(%2, [6, 4, 16])
%13 = reshape(%3, [6, 2, 16])
%14 = reshape(%8, [3, 8])
%15 = unsqueeze(%14, 0)
%16 = expand(%15, [2, -1, -1])
%17 = reshape(%16, [6, 8])
%18 = reshape(%9, [3, 8])
%19 = unsqueeze(%18, 0)
%20 = expand(%19, [2, -1, -1])
%21 = reshape(%20, [6, 8])
%22 = tkv.rope_reshape_and_cache(""",
    )


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_a_stacked_cache_is_written_in_place_by_generated_code(dynamic: bool | None) -> None:
    def program(kv: Tensor, q: Tensor, k: Tensor, v: Tensor, angles: Tensor, s: Tensor) -> Tensor:
        write(kv[0], kv[1], halves(k, angles), v, s)
        return halves(q, angles)

    cache = torch.randn(3, 2, N, P, HKV, D)[1]  # in the middle of its storage
    q, k, v = torch.randn(T, HQ + 2 * HKV, D).split((HQ, HKV, HKV), 1)
    _, (_, angles, slots) = make_inputs()
    if dynamic:
        torch._dynamo.mark_dynamic(cache, 1)
    result = run_compiled(program, [cache], q, k, v, angles[:, None], slots, rtol=1e-6)
    assert result.code.count("torch.ops.tkv.rope_reshape_and_cache.default(") == 1
    assert not cache_sized(result.code, N * P * HKV * D, N)
