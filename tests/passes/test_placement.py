"""The operator runs after its operands and old readers, and before new readers."""

from __future__ import annotations

import torch
from compiled import run_compiled
from expecttest import assert_expected_inline
from torch import Tensor

N, P, H, D, T = 7, 4, 2, 16, 3


def make_inputs() -> tuple[list[Tensor], tuple[Tensor, ...]]:
    k, v = torch.randn(2, T, H, D)
    return [torch.randn(N, P, H, D), torch.randn(N, P, H, D)], (k, v, torch.tensor([1, 9, 22]))


def test_slots_go_to_the_operator_and_readers_read_the_input() -> None:
    def program(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
        kc[s // P, s % P] = k
        vc.view(-1, H, D)[s] = v
        return vc.sum()

    caches, tokens = make_inputs()
    assert_expected_inline(
        run_compiled(program, caches, *tokens, generate=False).text,
        """\
%0 = tkv.reshape_and_cache(input2, input4, input1, input3, input0, wrap=True)
%1 = sum(input3)""",
    )


def test_free_blocks_and_offsets_wrap_one_by_one() -> None:
    def program(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> None:
        for cache, x in ((kc, k), (vc, v)):
            cache[s % 5, s // 10] = x

    caches, tokens = make_inputs()
    assert_expected_inline(
        run_compiled(program, caches, *tokens, generate=False).text,
        """\
%0 = remainder(input0, 5)
%1 = div(input0, 10, rounding_mode=floor)
%2 = lt(%0, 0)
%3 = add(%0, 7)
%4 = where(%2, %3, %0)
%5 = lt(%4, 0)
%6 = lt(%1, 0)
%7 = add(%1, 4)
%8 = where(%6, %7, %1)
%9 = lt(%8, 0)
%10 = ge(%8, 4)
%11 = mul(%4, 4)
%12 = add(%11, %8)
%13 = bitwise_or(%5, %9)
%14 = bitwise_or(%13, %10)
%15 = full([], 9223372036854775807, dtype=torch.int64, device=cpu, pin_memory=False)
%16 = where(%14, %15, %12)
%17 = tkv.reshape_and_cache(input2, input4, input1, input3, %16, wrap=False)""",
    )


def test_all_layers_share_one_computation_of_the_slots() -> None:
    def program(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> None:
        for layer in range(3):
            kc[layer, s % 5, s // 10] = k
            vc[layer, s % 5, s // 10] = v

    _, tokens = make_inputs()
    caches = [torch.randn(3, N, P, H, D) for _ in range(2)]
    result = run_compiled(program, caches, *tokens, generate=False)
    assert result.matched == 3
    assert result.text.count(" = where(") == 3


def test_a_value_computed_late_moves_up_to_the_operator() -> None:
    # Inductor moves nodes down to their first user: V's projection ends up behind the reader of K.
    def program(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
        kc[s // P, s % P] = k
        scores = kc[s // P, s % P].sum(-1, keepdim=True)
        vc[s // P, s % P] = v @ v.mT @ v
        return scores * vc[s // P, s % P]

    caches, tokens = make_inputs()
    result = run_compiled(program, caches, *tokens)
    assert result.matched == 1


def test_an_old_reader_moves_up_before_the_operator() -> None:
    def program(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
        old = kc.amax((0, 1))
        kc[s // P, s % P] = k
        vc[s // P, s % P] = v
        return kc.amax((0, 1)) * 2 - old

    caches, tokens = make_inputs()
    assert run_compiled(program, caches, *tokens).matched == 1


def test_an_index_read_from_a_cache_twice_is_read_once() -> None:
    def program(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> None:
        kc[kc[s % N, 0, 0, 0].long() % N, s % P] = k
        vc[vc[s % N, 0, 0, 0].long() % N, s % P] = v
        kc[vc[s % N, 1, 0, 0].long() % N, s % P] = k
        vc[vc[s % N, 1, 0, 0].long() % N, s % P] = v

    caches, tokens = make_inputs()
    caches = [cache.mul(9).trunc().abs() for cache in caches]
    run_compiled(program, caches, *tokens, generate=False)


def test_negative_blocks_and_offsets_wrap() -> None:
    def program(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, b: Tensor, o: Tensor) -> None:
        kc[b, o], vc[b, o] = k, v

    caches, (k, v, _) = make_inputs()
    b, o = torch.tensor([-1, 2, -N]), torch.tensor([3, -P, -1])
    assert run_compiled(program, caches, k, v, b, o).matched == 1
