from __future__ import annotations

import pytest
import torch
from paged import Batch, make_batch, make_modifiers
from torch import Tensor

import torch_tkv


def make_states(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out_a, out_b = torch.randn(2, 7, 4, 16).to(dtype)
    lse_a, lse_b = torch.randn(2, 7, 4) * 3
    return out_a, lse_a, out_b, lse_b


def split(batch: Batch, at: int) -> tuple[Batch, Batch]:
    """Return the batches over the first `at` blocks of every sequence, and over the others."""
    keys = at * batch.key_cache.shape[1]
    first = {"block_table": batch.block_table[:, :at], "seq_lens": batch.seq_lens.clamp(max=keys)}
    rest = {"block_table": batch.block_table[:, at:], "seq_lens": (batch.seq_lens - keys).clamp(0)}
    return batch._replace(**first), batch._replace(**rest)


@pytest.mark.parametrize("names", [(), ("softcap", "sinks"), ("query_bias",)])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_context_split_in_two_merges_to_the_whole(at: int, names: tuple[str, ...]) -> None:
    """All queries see all of the prefix; a sink is given to one side only."""
    batch = make_batch([41, 33, 40, 45], [1, 1, 8, 13], padding=2)
    options = make_modifiers(batch, names)
    whole = torch_tkv.paged_attention_lse(*batch, **options)
    prefix, rest = split(batch, at)
    late = {name: options[name] for name in options if name == "softcap"}
    states = (
        torch_tkv.paged_attention_lse(*prefix, causal=False, **late),
        torch_tkv.paged_attention_lse(*rest, **options),
    )
    merged = torch_tkv.merge_attention_states(*states[0], *states[1])
    torch.testing.assert_close(merged.out, whole.out)
    torch.testing.assert_close(merged.lse, whole.lse)


def test_the_merge_is_the_mean_weighted_by_the_denominators() -> None:
    out_a, lse_a, out_b, lse_b = make_states()
    merged = torch_tkv.merge_attention_states(out_a, lse_a, out_b, lse_b)
    a, b = lse_a.double().exp()[..., None], lse_b.double().exp()[..., None]
    expected = (a * out_a + b * out_b) / (a + b)
    torch.testing.assert_close(merged.out, expected.float())
    torch.testing.assert_close(merged.lse, (a + b).log()[..., 0].float())


def test_a_side_that_saw_no_key_leaves_the_other_as_it_is() -> None:
    out_a, lse_a, out_b, lse_b = make_states(torch.bfloat16)
    nothing, garbage = torch.full_like(lse_a, -torch.inf), torch.full_like(out_a, torch.nan)
    for merged in (
        torch_tkv.merge_attention_states(garbage, nothing, out_b, lse_b),
        torch_tkv.merge_attention_states(out_b, lse_b, garbage, nothing),
    ):
        assert torch.equal(merged.out, out_b)
        assert torch.equal(merged.lse, lse_b)
    merged = torch_tkv.merge_attention_states(garbage, nothing, garbage, nothing)
    assert (merged.out == 0).all()
    assert (merged.lse == -torch.inf).all()


def test_far_apart_and_large_denominators_do_not_overflow() -> None:
    out_a, _, out_b, _ = make_states()
    lse = torch.full((7, 4), 3e38)
    merged = torch_tkv.merge_attention_states(out_a, lse, out_b, -lse)
    assert torch.equal(merged.out, out_a)
    merged = torch_tkv.merge_attention_states(out_a, lse, out_b, lse)
    torch.testing.assert_close(merged.out, (out_a + out_b) / 2)


# fmt: off
BAD = [
    ("out_a", lambda t: t.double(), TypeError, "out_a must be float32 or float16 or bfloat16 [T, Hq, Dv], got float64 (7, 4, 16)"),
    ("out_a", lambda t: t.mT, ValueError, "out_a must be of last stride 1, got strides (64, 1, 16)"),
    ("out_b", lambda t: t.half(), TypeError, "out_b must be float32 [T, Hq, Dv], got float16 (7, 4, 16)"),
    ("out_b", lambda t: t[:6], ValueError, "out_b must be [T, Hq, Dv] = (7, 4, 16) like out_a, got float32 (6, 4, 16)"),
    ("lse_a", lambda t: t.half(), TypeError, "lse_a must be float32 [T, Hq], got float16 (7, 4)"),
    ("lse_b", lambda t: t.T, ValueError, "lse_b must be [T, Hq] = (7, 4) like out_a, got float32 (4, 7)"),
    ("lse_b", lambda t: t.to("meta"), ValueError, "lse_b must be on cpu like the first, got one on meta"),
]
# fmt: on


@pytest.mark.parametrize(("argument", "spoil", "error", "says"), BAD)
def test_bad_input_is_named(argument, spoil, error, says) -> None:
    kwargs = dict(zip(("out_a", "lse_a", "out_b", "lse_b"), make_states(), strict=True))
    kwargs[argument] = spoil(kwargs[argument])
    with pytest.raises(error) as caught:
        torch_tkv.merge_attention_states(**kwargs)
    assert str(caught.value) == f"merge_attention_states: {says}"


def test_opcheck_accepts_contiguous_and_strided_states() -> None:
    out_a, lse_a, out_b, lse_b = make_states()
    operator = torch.ops.tkv.merge_attention_states
    torch.library.opcheck(operator, (out_a, lse_a, out_b, lse_b))
    strided = torch.randn(4, 7, 24)[..., 8:].transpose(0, 1)
    torch.library.opcheck(operator, (strided, lse_a.T.contiguous().T, out_b, lse_b))


def test_the_operator_compiles_without_a_graph_break_and_with_dynamic_shapes() -> None:
    compiled = torch.compile(torch_tkv.merge_attention_states, fullgraph=True, dynamic=True)
    states = make_states()
    for tokens in (7, 5):
        some = [tensor[:tokens] for tensor in states]
        expected = torch_tkv.merge_attention_states(*some)
        torch.testing.assert_close(compiled(*some), expected)
