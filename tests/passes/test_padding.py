"""padding="skip" writes nothing for negative indices; otherwise these count from the end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compiled import Recorder, post_grad_only
from expecttest import assert_expected_inline
from torch import Tensor
from torch._inductor import config

from torch_tkv.passes.pipeline import Pipeline
from torch_tkv.passes.report import report

N, P, H, D = 7, 4, 2, 16

Program = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def slots(kc: Tensor, vc: Tensor, x: Tensor, s: Tensor) -> None:
    kc.view(-1, H, D)[s] = x
    vc[s // P, s % P] = x


def blocks(kc: Tensor, vc: Tensor, x: Tensor, s: Tensor) -> None:
    kc[s, s % P], vc[s, s % P] = x, x


def offsets(kc: Tensor, vc: Tensor, x: Tensor, s: Tensor) -> None:
    kc[s % 5, s], vc[s % 5, s] = x, x


def positions(kc: Tensor, vc: Tensor, x: Tensor, s: Tensor) -> None:
    kc[:, s] = x.expand(N, *x.shape)
    vc[:, s] = x.expand(N, *x.shape)


def one_tensor(kc: Tensor, vc: Tensor, x: Tensor, s: Tensor) -> None:
    kc[:, s] = x.expand(N, *x.shape)


@pytest.mark.parametrize(
    "program", [slots, blocks, offsets, positions, one_tensor], ids=lambda program: program.__name__
)
@pytest.mark.parametrize("padding", ["wrap", "skip"])
def test_a_negative_index_is_what_the_option_says(program: Program, padding: str) -> None:
    caches = torch.randn(2, N, P, H, D)
    x, s = torch.randn(4, H, D), torch.tensor([1, -1, 0, -2])
    expected = caches.clone()
    kept = s >= (0 if padding == "skip" else -P)
    program(*expected, x[kept], s[kept])
    recorder = Recorder(padding=padding)
    with config.patch(post_grad_custom_post_pass=recorder):
        torch.compile(program, backend=post_grad_only)(*caches.unbind(0), x, s)
    assert torch.equal(caches, expected)
    assert recorder.matched == 1
    assert f'padding="{padding}"' in str(report())


def test_skipped_blocks_and_offsets_are_slot_minus_one() -> None:
    recorder = Recorder(padding="skip")
    with config.patch(post_grad_custom_post_pass=recorder):
        compiled = torch.compile(blocks, backend=post_grad_only)
        compiled(*torch.zeros(2, N, P, H, D).unbind(0), torch.ones(2, H, D), torch.tensor([-1, 3]))
    assert_expected_inline(
        recorder.text,
        """\
%0 = remainder(input0, 4)
%1 = lt(input0, 0)
%2 = lt(%0, 0)
%3 = ge(%0, 4)
%4 = mul(input0, 4)
%5 = add(%4, %0)
%6 = full([], 9223372036854775807, dtype=torch.int64, device=cpu, pin_memory=False)
%7 = where(%3, %6, %5)
%8 = bitwise_or(%1, %2)
%9 = full([], -1, dtype=torch.int64, device=cpu, pin_memory=False)
%10 = where(%8, %9, %7)
%11 = tkv.reshape_and_cache(input2, input2, input1, input3, %10, wrap=False)""",
    )


def test_the_key_of_compiled_code_holds_the_padding() -> None:
    assert Pipeline(padding="skip").uuid() == Pipeline(padding="skip").uuid()
    assert Pipeline(padding="skip").uuid() != Pipeline().uuid()
