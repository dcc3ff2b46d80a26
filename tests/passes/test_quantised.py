"""A cast before a write, and a division with a cast to float8, are left to the operator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compiled import Recorder, run_compiled
from paged import clone_storages
from torch import Tensor
from torch._inductor import config

from torch_tkv import paged_attention
from torch_tkv.passes.report import report

N, P, H, D, T = 7, 4, 2, 16, 8
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LIMIT = torch.finfo(E4M3).max

Quantise = Callable[[Tensor, Tensor], Tensor]
Program = Callable[..., None]


def make_inputs(cache: torch.dtype, tokens: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    caches = [torch.randn(N, P, H, D).to(cache) for _ in range(2)]
    k, v = (torch.randn(2, T, H, D) * 100).to(tokens)
    k[0, 0, :3] = torch.tensor([1e4, -1e4, float("inf")])
    return caches, [k, v, torch.randperm(N * P)[:T], torch.tensor(0.23)]


def writer(quantise: Quantise) -> Program:
    def program(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor, scale: Tensor) -> None:
        kc[s // P, s % P] = quantise(k, scale)
        vc[s // P, s % P] = quantise(v, scale)

    return program


def per_head(x: Tensor, scale: Tensor) -> Tensor:
    return x / (scale * torch.arange(1.0, H + 1, device=x.device).view(1, H, 1))


def per_token(x: Tensor, scale: Tensor) -> Tensor:
    return x / (scale * torch.arange(1.0, T + 1, device=x.device).view(T, 1, 1))


def saturated(scaled: Quantise, limit: float = LIMIT) -> Quantise:
    return lambda x, scale: scaled(x, scale).clamp(-limit, limit).to(E4M3)


# How, and whether the division is the operator's.
QUANTISED: dict[str, tuple[Quantise, bool]] = {
    "divide": (saturated(lambda x, scale: x / scale), True),
    "in float32": (saturated(lambda x, scale: x.float() / scale), True),
    "by a number": (saturated(lambda x, scale: x / 0.5), True),
    "per head": (saturated(per_head), True),
    "per token": (saturated(per_token), False),
    "multiply": (saturated(lambda x, scale: x * (1 / scale)), False),
    "clamp": (saturated(lambda x, scale: x), False),
    "clamp closer": (saturated(lambda x, scale: x / scale, 240.0), False),
    "cast": (lambda x, scale: x.to(E4M3), False),
}
quantised = pytest.mark.parametrize("how", QUANTISED)


@quantised
@pytest.mark.parametrize("as_bytes", [False, True], ids=["float8", "bytes"])
def test_a_quantised_write_is_one_operator(how: str, as_bytes: bool) -> None:
    quantise, divides = QUANTISED[how]

    def program(kc: Tensor, vc: Tensor, *args: Tensor) -> None:
        if as_bytes:  # what the caches are is bytes, and what is written is bytes
            writer(lambda x, scale: quantise(x, scale).view(torch.uint8))(kc, vc, *args)
        else:
            writer(quantise)(kc.view(E4M3), vc.view(E4M3), *args)

    (kc, vc), tokens = make_inputs(E4M3, torch.float32)
    if how == "cast":  # up to torch 2.12, what is too large becomes NaN, which is equal to nothing
        tokens[0].clamp_(-LIMIT, LIMIT)
        tokens[1].clamp_(-LIMIT, LIMIT)
    if as_bytes:
        kc, vc = kc.view(torch.uint8), vc.view(torch.uint8)
    result = run_compiled(program, [kc, vc], *tokens, generate=False)
    assert result.matched == 1
    *_, call = result.text.splitlines()
    assert (call.count(",") == 7) == divides


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["divide", "in float32", "per head", "cast"])
def test_the_operator_rounds_as_inductor_does(how: str) -> None:
    write = writer(QUANTISED[how][0])
    caches, tokens = make_inputs(E4M3, torch.bfloat16)
    caches, tokens = ([x.cuda() for x in tensors] for tensors in (caches, tokens))
    ours, stock = clone_storages(*caches), clone_storages(*caches)
    torch.compile(write)(*stock, *tokens)
    torch._dynamo.reset()
    with config.patch(post_grad_custom_post_pass=Recorder()):
        torch.compile(write)(*ours, *tokens)
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0, equal_nan=True)
    assert ("rounded once" in str(report())) == (how == "divide")


@pytest.mark.parametrize("how", ["divide", "in float32", "multiply"])
def test_on_cpu_it_rounds_as_eager_does(how: str) -> None:
    caches, tokens = make_inputs(E4M3, torch.bfloat16)
    caches = [cache.view(torch.uint8) for cache in caches]
    write = writer(lambda x, scale: QUANTISED[how][0](x, scale).view(torch.uint8))
    assert run_compiled(write, caches, *tokens).matched == 1


@pytest.mark.parametrize(
    ("cache", "tokens"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_a_cast_to_the_dtype_of_the_cache_changes_nothing(
    cache: torch.dtype, tokens: torch.dtype
) -> None:
    caches, inputs = make_inputs(cache, tokens)
    program = writer(lambda x, scale: x.to(cache))
    assert run_compiled(program, caches, *inputs, generate=False).matched == 1


def test_a_write_that_casts_by_itself_is_left_to_the_operator() -> None:
    def program(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor, scale: Tensor) -> None:
        kc[:2, 1:], vc[:2, 1:] = k[:6].view(2, 3, H, D), v[:6].view(2, 3, H, D)

    caches, inputs = make_inputs(torch.bfloat16, torch.float32)
    assert run_compiled(program, caches, *inputs, generate=False).matched == 1


@pytest.mark.filterwarnings("ignore:torch_tkv")
def test_a_cast_that_overflows_to_infinity_is_left_alone() -> None:
    caches, inputs = make_inputs(E5M2, torch.float32)
    program = writer(lambda x, scale: (x / scale).to(E5M2))
    assert run_compiled(program, caches, *inputs, generate=False).matched == 0
    assert "overflows to infinity: clamp to its range first" in str(report())


def test_keys_and_values_of_other_dtypes_are_widened() -> None:
    def program(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor, scale: Tensor) -> None:
        kc[s // P, s % P] = k.float()
        vc[s // P, s % P] = v.float() * 2

    caches, inputs = make_inputs(torch.float32, torch.bfloat16)
    assert run_compiled(program, caches, *inputs, generate=False).matched == 1


def attend(
    kc: Tensor, vc: Tensor, q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    table = torch.arange(6, dtype=torch.int32, device=q.device).view(2, 3)
    lens, starts = table[0] * 0 + 9, table[0].clamp(max=1) * q.shape[0]
    out = paged_attention(q, kc, vc, table, lens[:2], starts)
    return (out.view(q.shape[0], -1).to(dtype) / scale).clamp(-LIMIT, LIMIT).to(E4M3)


def make_attention(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    caches = [torch.randn(N, P, H, D).to(dtype) for _ in range(2)]
    return caches, [torch.randn(3, 4, D).to(dtype), torch.tensor(0.0137)]


def test_attention_quantises_its_own_output() -> None:
    caches, inputs = make_attention()
    result = run_compiled(attend, caches, *inputs)
    assert "div" not in result.text
    assert "fused: paged_attention + float8 output" in str(report())


def scaled_by_head(kc: Tensor, vc: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    return attend(kc, vc, q, scale.expand(4 * D) * 2)


def attend_once_more(kc: Tensor, vc: Tensor, q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    table = torch.arange(3, dtype=torch.int32).view(1, 3)
    lens, starts = torch.full((1,), 9), torch.arange(2) * 3
    out = paged_attention(q, kc, vc, table, lens, starts)
    return (out / scale).clamp(-LIMIT, LIMIT).to(E4M3), out


def divided_wider(kc: Tensor, vc: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    return attend(kc.bfloat16(), vc.bfloat16(), q.bfloat16(), scale)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (divided_wider, "divided in float32, which keeps a rounding: divide in torch.bfloat16"),
        (scaled_by_head, "the scale varies"),
        (attend_once_more, "the output is also used as it is"),
    ],
)
def test_attention_that_the_operator_would_change_is_left_alone(
    program: Callable[..., Tensor], reason: str
) -> None:
    caches, inputs = make_attention()
    assert "div" in run_compiled(program, caches, *inputs, generate=False).text
    assert reason in str(report())


def differing(a: Tensor, b: Tensor) -> float:
    return (a.float() != b.float()).float().mean().item()


@pytest.mark.gpu
def test_attention_differs_from_eager_no_more_than_inductor_does() -> None:
    def program(kc: Tensor, vc: Tensor, q: Tensor, scale: Tensor) -> Tensor:
        return attend(kc, vc, q, scale, torch.bfloat16)

    caches = [torch.randn(N, P, H, 128).bfloat16().cuda() for _ in range(2)]
    inputs = [*caches, torch.randn(400, 4, 128).bfloat16().cuda(), torch.tensor(0.0137).cuda()]
    stock = torch.compile(program)(*inputs)
    torch._dynamo.reset()
    with config.patch(post_grad_custom_post_pass=Recorder()):
        ours = torch.compile(program)(*inputs)
    eager = program(*inputs)
    assert "fused: paged_attention + float8 output" in str(report())
    assert 0 < differing(ours, eager) < 1.2 * differing(stock, eager)
