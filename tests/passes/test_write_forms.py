"""Writes of static caches, slices, stacks, quantised and lone ones become operators in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled import cache_sized, run_compiled
from torch import Tensor

# A static cache is [B, H, S, D] or [B, S, H, D]; a paged one [N, P, H, D].
B, H, S, D, T = 2, 2, 9, 16, 3
N, P = 7, 4

Program = Callable[..., Any]


def static_index_copy(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
    kc.index_copy_(2, pos, k)
    vc.index_copy_(2, pos, v)
    return kc.sum()


def static_assignment(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
    kc[:, :, pos] = k
    vc[:, :, pos] = v
    return vc.sum()


def static_token_major(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> None:
    kc.transpose(1, 2)[:, pos] = k.transpose(1, 2)
    vc.transpose(1, 2).index_copy_(1, pos, v.transpose(1, 2))


def rows_and_positions(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
    row = torch.arange(k.shape[0])[:, None]
    kc[row, :, pos] = k.transpose(1, 2)
    vc.transpose(1, 2)[row, pos[None]] = v.transpose(1, 2)
    return kc.sum()


def scatter(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
    index = pos.view(1, 1, -1, 1).expand(k.shape)
    kc.scatter_(2, index, k)
    vc.scatter_(2, pos[:, None].expand(v.shape), v)
    return kc.sum()


def scatter_for_each_row(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> None:
    index = torch.stack([pos, pos + 1])[:, None, :, None].expand(k.shape)
    kc.scatter_(2, index, k)
    vc.scatter_(2, index, v)


def one_position(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
    kc[:, :, 5] = k[:, :, 0]
    vc.transpose(1, 2)[:, 5] = v[:, :, 0]
    return kc.sum()


def slice_of_positions(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
    kc[:, :, 2:5] = k
    vc.narrow(2, 2, 3).copy_(v)
    return kc.sum()


def part_of_the_batch(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
    kc.transpose(1, 2)[:1, 4 : 4 + T] = k[:1].transpose(1, 2)
    vc.transpose(1, 2)[:1, 4 : 4 + T] = v[:1].transpose(1, 2)
    return kc.sum()


def one_row_of_the_batch(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> None:
    kc[1, :, pos] = k[0]
    vc[1, :, pos] = v[0]


def lone_write(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
    kc[:, :, pos] = k
    return kc.sum()


def value_from_new_keys(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
    kc[:, :, pos] = k
    vc[:, :, pos] = v + kc[:, :, pos]
    return vc.sum()


STATIC: dict[Program, int] = {
    static_index_copy: 1,
    static_assignment: 1,
    static_token_major: 1,
    rows_and_positions: 1,
    scatter: 1,
    scatter_for_each_row: 1,
    one_position: 1,
    slice_of_positions: 1,
    part_of_the_batch: 1,
    one_row_of_the_batch: 1,
    lone_write: 1,
    value_from_new_keys: 2,
}


def stacked_values(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    kv[:, s // P, s % P] = torch.stack([k, v])
    return kv.sum()


def stacked_in_the_middle(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> None:
    kv.transpose(0, 1)[s // P, :, s % P] = torch.stack([k, v], 1)


def stacked_last(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> None:
    kv.permute(1, 2, 3, 0, 4)[s // P, s % P] = torch.stack([k, v], 2)


def stacked_in_front_of_heads(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> None:
    kv.permute(1, 2, 0, 3, 4)[s // P, s % P] = torch.stack([k, v], 1) * 2


def rows_of_all_heads(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> None:
    kv[0].view(-1, H * D)[s] = k.flatten(1)
    kv[1].view(N, P, H * D)[s // P, s % P] = v.flatten(1)


def whole_blocks(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> None:
    pages = k[:, None] + torch.arange(P).view(1, P, 1, 1)
    kv[0, s // P] = pages
    kv[1, s // P] = pages + v[:, None]


def one_token(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> None:
    kv[0, 3, 2] = k[0]
    kv[1, 3, 2] = v[0]


def next_slots(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> None:
    kv[0].flatten(0, 1)[7 : 7 + T] = k
    kv[1].flatten(0, 1)[7 : 7 + T] = v


def remainder_by_subtraction(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> None:
    block = torch.div(s, P, rounding_mode="floor")
    kv[0, block, s - block * P] = k
    kv[1, block, s - block * P] = v


PAGED: dict[Program, int] = {
    stacked_values: 1,
    stacked_in_the_middle: 1,
    stacked_last: 1,
    stacked_in_front_of_heads: 1,
    rows_of_all_heads: 2,
    whole_blocks: 1,
    one_token: 1,
    next_slots: 1,
    remainder_by_subtraction: 1,
}
FORMS = STATIC | PAGED
forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)


def make_inputs(form: Program, *, offset: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    shapes = [(2, N, P, H, D)] if form in PAGED else [(B, H, S, D)] * 2
    caches = [torch.randn(3, *shape)[1] if offset else torch.randn(shape) for shape in shapes]
    tokens = (T, H, D) if form in PAGED else (B, H, T, D)
    where = torch.randperm(N * P if form in PAGED else S - 1)[:T]
    return caches, [torch.randn(tokens), torch.randn(tokens), where]


def mark_tokens(form: Program, tokens: list[Tensor]) -> None:
    """Make the number of tokens symbolic."""
    for tensor in tokens:
        torch._dynamo.mark_dynamic(tensor, [*tensor.shape].index(T))


@pytest.mark.parametrize(
    "form",
    [
        static_index_copy,
        scatter,
        slice_of_positions,
        part_of_the_batch,
        value_from_new_keys,
        stacked_values,
        whole_blocks,
        one_token,
    ],
    ids=lambda form: form.__name__,
)
def test_a_write_is_one_operator_without_a_copy(form: Program) -> None:
    caches, tokens = make_inputs(form, offset=True)
    result = run_compiled(form, caches, *tokens)
    assert result.matched == FORMS[form]
    assert result.code.count("torch.ops.tkv.") == FORMS[form]
    assert not cache_sized(result.code, caches[0].numel() // 2, N)


@forms
@pytest.mark.parametrize("buffers", [False, True], ids=["inputs", "buffers"])
@pytest.mark.parametrize("dynamic", [None, "tokens", "all"])
def test_inputs_and_buffers_of_any_shape_are_written_alike(
    form: Program, buffers: bool, dynamic: str | None
) -> None:
    caches, tokens = make_inputs(form)
    if dynamic == "tokens" and form not in (slice_of_positions, part_of_the_batch, next_slots):
        mark_tokens(form, tokens)
    options = {"buffers": buffers, "dynamic": True if dynamic == "all" else None}
    assert run_compiled(form, caches, *tokens, generate=False, **options).matched == FORMS[form]
