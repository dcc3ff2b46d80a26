from __future__ import annotations

import pytest
import torch
from paged import (
    LAYOUTS,
    MODIFIERS,
    attend_by_loop,
    make_batch,
    make_modifiers,
    make_scales,
)

import torch_tkv

MIXED = ([5, 9, 0, 3, 12, 2], [1, 4, 1, 3, 2, 4])


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("names", [(), ("sinks",), MODIFIERS])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_and_lse_equal_those_of_a_loop(layout: str, names, window: int | None) -> None:
    batch = make_batch(*MIXED, block_size=4, layout=layout, padding=2, window=window)
    options = make_modifiers(batch, names) | {"window": window}
    state = torch_tkv.paged_attention_lse(*batch, scale=0.25, **options)
    out, lse = attend_by_loop(batch, 0.25, **options)
    torch.testing.assert_close(state.out, out)
    torch.testing.assert_close(state.lse, lse)
    assert torch.equal(state.out, torch_tkv.paged_attention(*batch, scale=0.25, **options))


def test_a_query_that_sees_no_key_has_an_lse_of_minus_infinity() -> None:
    batch = make_batch([2, 0, 7], [5, 1, 2], padding=3)
    for sinks in (None, torch.randn(4)):
        state = torch_tkv.paged_attention_lse(*batch, sinks=sinks)
        blind = torch.tensor([True] * 3 + [False] * 2 + [True] + [False] * 2 + [True] * 3)
        assert (state.lse[blind] == -torch.inf).all()
        assert (state.out[blind] == 0).all()
        assert state.lse[~blind].isfinite().all()


def test_lse_is_float32_whatever_the_query_is() -> None:
    batch = make_batch(*MIXED, dtype=torch.bfloat16)
    state = torch_tkv.paged_attention_lse(*batch)
    assert (state.out.dtype, state.lse.dtype) == (torch.bfloat16, torch.float32)
    wide = torch_tkv.paged_attention_lse(*(t.float() for t in batch[:3]), *batch[3:])
    torch.testing.assert_close(state.lse, wide.lse)


def test_bad_input_is_named_after_the_operator() -> None:
    batch = make_batch([5], [1])
    with pytest.raises(ValueError, match=r"^paged_attention_lse: softcap must be positive"):
        torch_tkv.paged_attention_lse(*batch, softcap=-1.0)
    batch.query.requires_grad_()
    with pytest.raises(NotImplementedError, match=r"^paged_attention_lse: there is no backward"):
        torch_tkv.paged_attention_lse(*batch)


def test_opcheck_accepts_every_option() -> None:
    batch = make_batch([5, 9, 3], [1, 4, 3], cache_dtype=torch.int8)
    options = make_modifiers(batch, MODIFIERS) | make_scales(batch, "per token and head")
    operator = torch.ops.tkv.paged_attention_lse
    torch.library.opcheck(operator, (*batch, 0.25), options | {"window": 4})


def test_the_operator_compiles_without_a_graph_break_and_with_dynamic_shapes() -> None:
    compiled = torch.compile(torch_tkv.paged_attention_lse, fullgraph=True, dynamic=True)
    for seq_lens, query_lens in (([5, 9, 3], [1, 4, 3]), ([7, 40], [7, 2])):
        batch = make_batch(seq_lens, query_lens)
        for got, right in zip(compiled(*batch), torch_tkv.paged_attention_lse(*batch), strict=True):
            torch.testing.assert_close(got, right)
