from __future__ import annotations

import pytest
import torch
from paged import LAYOUTS, Batch, make_batch
from torch import Tensor

import torch_tkv


def attend_by_loop(batch: Batch, scale: float, causal: bool) -> Tensor:
    """Attend query by query and head by head: the meaning of the operator, spelled out."""
    query, key_cache, value_cache, block_table, seq_lens, starts = batch
    block_size, group = key_cache.shape[1], query.shape[1] // key_cache.shape[2]
    out = query.new_zeros(*query.shape[:2], value_cache.shape[3])
    for b in range(len(seq_lens)):
        rows = range(int(starts[b]), int(starts[b + 1]))
        for position, t in enumerate(rows, start=int(seq_lens[b]) - len(rows)):
            visible = range(position + 1) if causal else range(int(seq_lens[b]))
            slots = [(int(block_table[b, n // block_size]), n % block_size) for n in visible]
            if not slots:
                continue
            for h in range(query.shape[1]):
                keys = torch.stack(
                    [key_cache[block, offset, h // group] for block, offset in slots]
                )
                values = torch.stack(
                    [value_cache[block, offset, h // group] for block, offset in slots]
                )
                out[t, h] = (keys @ query[t, h] * scale).softmax(0) @ values
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mixed_batch_equals_a_loop_over_its_queries(layout: str, causal: bool) -> None:
    batch = make_batch([5, 9, 0, 3, 12], [1, 4, 0, 3, 2], block_size=4, layout=layout, padding=2)
    out = torch_tkv.paged_attention(*batch, causal=causal)
    torch.testing.assert_close(out, attend_by_loop(batch, 16**-0.5, causal))
    assert (out[-2:] == 0).all()


def test_value_heads_may_have_another_size_and_the_scale_may_be_given() -> None:
    batch = make_batch([5, 9], [2, 9], head_size=24, value_size=40, heads=(6, 2))
    out = torch_tkv.paged_attention(*batch, scale=0.5)
    assert out.shape == (11, 6, 40)
    torch.testing.assert_close(out, attend_by_loop(batch, 0.5, True))


def test_a_query_before_the_first_key_gives_zeros() -> None:
    batch = make_batch([2], [5])
    out = torch_tkv.paged_attention(*batch)
    assert (out[:3] == 0).all()
    torch.testing.assert_close(out, attend_by_loop(batch, 0.25, True))


def batch_arguments() -> dict[str, Tensor]:
    return make_batch([5, 20], [1, 3])._asdict()


# fmt: off
BAD = [
    ("query", lambda t: t.int(), TypeError, "query must be float32 or float16 or bfloat16 [T, Hq, D], got int32 (4, 4, 16)"),
    ("query", lambda t: t[:, :3], ValueError, "query must be [T, Hq, D] with Hq a multiple of Hkv = 2, got float32 (4, 3, 16)"),
    ("query", lambda t: t[..., :8], ValueError, "key_cache must be [N, P, Hkv, D = 8] like query, got float32 (6, 16, 2, 16)"),
    ("query", lambda t: t.half(), TypeError, "key_cache must be float16 [N, P, Hkv, D], got float32 (6, 16, 2, 16)"),
    ("value_cache", lambda t: t.repeat(1, 1, 1, 17), ValueError, "value_cache must be of head size <= 256, got float32 (6, 16, 2, 272)"),
    ("value_cache", lambda t: t[:4], ValueError, "value_cache must be [N = 6, P = 16, Hkv = 2, Dv] like key_cache, got float32 (4, 16, 2, 16)"),
    ("block_table", lambda t: t[0], ValueError, "block_table must be int32 or int64 [B, max_blocks], got int32 (3,)"),
    ("block_table", lambda t: t[:1], ValueError, "block_table must be [B = 2, max_blocks] like seq_lens, got int32 (1, 3)"),
    ("block_table", lambda t: t[:, :1], ValueError, "seq_lens must be at most the 16 keys that block_table has room for, got [5, 20]"),
    ("block_table", lambda t: t[:, :2] * 0 + 6, IndexError, "block_table must be blocks of the cache's 6 wherever seq_lens reaches, got [[6, 6], [6, 6]]"),
    ("seq_lens", lambda t: t.float(), TypeError, "seq_lens must be int32 or int64 [B], got float32 (2,)"),
    ("query_start_loc", lambda t: t[1:], ValueError, "query_start_loc must be [B + 1 = 3] like seq_lens, got int32 (2,)"),
    ("query_start_loc", lambda t: t + 1, ValueError, "query_start_loc must be ascending from 0 to at most T = 4, got [1, 2, 5]"),
    ("query_start_loc", lambda t: t.to("meta"), ValueError, "query_start_loc must be on cpu like the first, got one on meta"),
]
# fmt: on


@pytest.mark.parametrize(("argument", "spoil", "error", "says"), BAD)
def test_bad_input_is_named(argument, spoil, error, says) -> None:
    kwargs = batch_arguments()
    kwargs[argument] = spoil(kwargs[argument])
    with pytest.raises(error) as caught:
        torch_tkv.paged_attention(**kwargs)
    assert str(caught.value) == f"paged_attention: {says}"


def test_autograd_is_refused_with_the_way_out() -> None:
    kwargs = batch_arguments()
    kwargs["query"].requires_grad_()
    with pytest.raises(
        NotImplementedError, match=r"paged_attention: there is no backward.*no_grad"
    ):
        torch_tkv.paged_attention(**kwargs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_accepts_contiguous_sliced_and_permuted_inputs(layout: str) -> None:
    batch = make_batch([5, 9, 3], [1, 4, 3], layout=layout)
    sliced = torch.randn(8, 4, 48)[..., 16:32]
    permuted = torch.randn(4, 8, 16).transpose(0, 1)
    for query in (batch.query, sliced, permuted):
        args = batch._replace(query=query)
        torch.library.opcheck(torch.ops.tkv.paged_attention, (*args, 0.25))


def test_the_operator_compiles_without_a_graph_break_and_with_dynamic_shapes() -> None:
    compiled = torch.compile(torch_tkv.paged_attention, fullgraph=True, dynamic=True)
    for seq_lens, query_lens in (([5, 9, 3], [1, 4, 3]), ([7, 40], [7, 2])):
        batch = make_batch(seq_lens, query_lens)
        torch.testing.assert_close(compiled(*batch), torch_tkv.paged_attention(*batch))
