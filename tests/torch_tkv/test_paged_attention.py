from __future__ import annotations

import itertools

import pytest
import torch
from paged import (
    LAYOUTS,
    MODIFIERS,
    SCALES,
    attend_by_loop,
    make_batch,
    make_modifiers,
    make_scales,
)
from torch import Tensor

import torch_tkv

# Lengths and query lengths: decode, prefill, several new tokens, nothing, and more queries than keys.
MIXED = ([5, 9, 0, 3, 12, 7, 2], [1, 4, 0, 3, 2, 0, 4])
FLOAT8_SCALES = itertools.product((torch.float8_e4m3fn, torch.float8_e5m2), SCALES)


def assert_equals_loop(batch, scale: float = 0.25, **options) -> None:
    out = torch_tkv.paged_attention(*batch, scale=scale, **options)
    torch.testing.assert_close(out, attend_by_loop(batch, scale, **options)[0])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mixed_batch_equals_a_loop_over_its_queries(layout: str, causal: bool) -> None:
    batch = make_batch(*MIXED, block_size=4, layout=layout, padding=2)
    assert_equals_loop(batch, causal=causal)
    assert (torch_tkv.paged_attention(*batch)[-2:] == 0).all()


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("names", [*((name,) for name in MODIFIERS), MODIFIERS])
def test_every_option_alone_and_together_equals_the_loop(names, window: int | None) -> None:
    batch = make_batch(*MIXED, block_size=4, padding=2, window=window)
    options = make_modifiers(batch, names, width=3)
    assert_equals_loop(batch, window=window, **options)
    if window is None:
        assert_equals_loop(batch, causal=False, **options)


@pytest.mark.parametrize(("cache_dtype", "kind"), [*FLOAT8_SCALES, (torch.int8, SCALES[-1])])
def test_codes_of_8_bits_are_multiplied_by_their_scales(cache_dtype, kind: str) -> None:
    batch = make_batch(*MIXED, block_size=4, cache_dtype=cache_dtype)
    assert_equals_loop(batch, **make_scales(batch, kind))


def test_a_cache_of_float8_needs_no_scale_and_may_have_one() -> None:
    batch = make_batch(*MIXED, cache_dtype=torch.float8_e4m3fn)
    assert_equals_loop(batch)
    assert_equals_loop(batch, v_scale=torch.tensor(0.3))


def test_attention_reads_what_reshape_and_cache_dynamic_wrote() -> None:
    key, value = torch.randn(2, 20, 2, 16)
    caches, scales = torch.zeros(2, 2, 16, 2, 16).to(torch.int8), torch.zeros(2, 2, 16, 2)
    torch_tkv.reshape_and_cache_dynamic(key, value, *caches, *scales, torch.arange(20))
    query = torch.randn(20, 4, 16)
    indices = torch.tensor([[0, 1]]), torch.tensor([20]), torch.tensor([0, 20])
    options = {"k_scale_cache": scales[0], "v_scale_cache": scales[1]}
    out = torch_tkv.paged_attention(query, *caches, *indices, **options)
    exact = torch_tkv.paged_attention(
        query, key[None], value[None], indices[0][:, :1], *indices[1:]
    )
    torch.testing.assert_close(out, exact, rtol=0.0, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_output_scale_divides_saturates_and_rounds_to_float8(dtype: torch.dtype) -> None:
    batch = make_batch(*MIXED)
    for output_scale in (torch.tensor(0.4), torch.tensor(1e-4)):
        out = torch_tkv.paged_attention(*batch, output_scale=output_scale)
        expected = (torch_tkv.paged_attention(*batch) / output_scale).clamp(-448, 448)
        assert out.dtype == torch.float8_e4m3fn
        assert torch.equal(out.float(), expected.to(torch.float8_e4m3fn).float())


def test_a_window_reads_no_block_before_it() -> None:
    batch = make_batch([70, 64, 30], [1, 5, 30], window=16)
    expected = torch_tkv.paged_attention(*batch, window=16)
    batch.block_table[0, :3] = batch.block_table[1, :2] = -7
    assert torch.equal(torch_tkv.paged_attention(*batch, window=16), expected)
    with pytest.raises(IndexError, match="block_table must be blocks of the cache's"):
        torch_tkv.paged_attention(*batch, window=40)


def test_a_tree_of_drafts_is_attended_as_each_of_its_branches() -> None:
    """Three drafts, of which the third follows the first and not the second."""
    batch = make_batch([9], [3])
    bias = torch.zeros(3, 3)
    bias[2, 1] = -torch.inf
    out = torch_tkv.paged_attention(*batch, query_bias=bias)
    key_cache, value_cache = (cache.clone() for cache in batch[1:3])
    block = int(batch.block_table[0, 0])
    for cache in (key_cache, value_cache):
        cache[block, 7] = cache[block, 8]  # the third draft takes the second's place
    branch = batch._replace(key_cache=key_cache, value_cache=value_cache)
    branch = branch._replace(query=batch.query[[0, 2]], seq_lens=torch.tensor([8]))
    branch = branch._replace(query_start_loc=torch.tensor([0, 2]))
    torch.testing.assert_close(out[2], torch_tkv.paged_attention(*branch)[1])


def test_value_heads_may_have_another_size_and_the_scale_may_be_given() -> None:
    batch = make_batch([5, 9], [2, 9], head_size=24, value_size=40, heads=(6, 2))
    assert torch_tkv.paged_attention(*batch).shape == (11, 6, 40)
    assert_equals_loop(batch, 0.5)


def test_a_query_that_sees_no_key_gives_zeros() -> None:
    batch = make_batch([2, 0], [5, 1])
    for sinks in (None, torch.randn(4)):
        out = torch_tkv.paged_attention(*batch, sinks=sinks)
        assert (out[[0, 1, 2, 5]] == 0).all()
    hidden = torch_tkv.paged_attention(*batch, query_bias=torch.full((6, 5), -torch.inf))
    assert (hidden == 0).all()


def test_a_query_of_nan_gives_nan() -> None:
    batch = make_batch([5], [1])
    batch.query[0, 0] = torch.nan
    out = torch_tkv.paged_attention(*batch)
    assert out[0, 0].isnan().all()
    assert not out[0, 1:].isnan().any()


def batch_arguments() -> dict[str, Tensor]:
    return make_batch([5, 20], [1, 3])._asdict()


FP8, ONE = torch.float8_e4m3fn, torch.tensor(1.0)
# fmt: off
BAD = [
    ("query", lambda t: t.int(), TypeError, "query must be float32 or float16 or bfloat16 [T, Hq, D], got int32 (4, 4, 16)"),
    ("query", lambda t: t[:, :3], ValueError, "query must be [T, Hq, D] with Hq a multiple of Hkv = 2, got float32 (4, 3, 16)"),
    ("query", lambda t: t[..., :8], ValueError, "key_cache must be [N, P, Hkv, D = 8] like query, got float32 (6, 16, 2, 16)"),
    ("query", lambda t: t.half(), TypeError, "key_cache must be float16 or int8 or float8_e4m3fn or float8_e5m2 [N, P, Hkv, D], got float32 (6, 16, 2, 16)"),
    ("value_cache", lambda t: t.to(FP8), TypeError, "value_cache must be float32 [N, P, Hkv, Dv], got float8_e4m3fn (6, 16, 2, 16)"),
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
BAD_OPTIONS = [
    ({"window": 0}, ValueError, "window must be at least 1, a query's own position, got 0"),
    ({"window": 4, "causal": False}, ValueError, "causal must be True where there is a window, got False"),
    ({"scale": -0.1}, ValueError, "scale must be positive and finite, got -0.1"),
    ({"softcap": 0.0}, ValueError, "softcap must be positive and finite, got 0.0"),
    ({"softcap": float("nan")}, ValueError, "softcap must be positive and finite, got nan"),
    ({"alibi_slopes": torch.ones(4).half()}, TypeError, "alibi_slopes must be float32 [Hq], got float16 (4,)"),
    ({"alibi_slopes": torch.ones(2)}, ValueError, "alibi_slopes must be [Hq = 4] like query, got float32 (2,)"),
    ({"alibi_slopes": torch.ones(8)[::2]}, ValueError, "alibi_slopes must be of last stride 1, got strides (2,)"),
    ({"sinks": torch.ones(4).int()}, TypeError, "sinks must be float32 or float16 or bfloat16 [Hq], got int32 (4,)"),
    ({"sinks": torch.ones(4, 1)}, ValueError, "sinks must be float32 or float16 or bfloat16 [Hq], got float32 (4, 1)"),
    ({"sinks": torch.ones(5)}, ValueError, "sinks must be [Hq = 4] like query, got float32 (5,)"),
    ({"query_bias": torch.ones(4, 3).bool()}, TypeError, "query_bias must be float32 [T, Q], got bool (4, 3)"),
    ({"query_bias": torch.ones(3, 3)}, ValueError, "query_bias must be [T = 4, Q] like query, got float32 (3, 3)"),
    ({"query_bias": torch.ones(3, 4).T}, ValueError, "query_bias must be of last stride 1, got strides (1, 4)"),
    ({"k_scale": ONE}, ValueError, "k_scale must be None where the caches are not float8, got float32 ()"),
    ({"v_scale": ONE}, ValueError, "v_scale must be None where the caches are not float8, got float32 ()"),
    ({"k_scale_cache": torch.ones(6, 16, 2)}, ValueError, "k_scale_cache must be None where the caches are not float8 or int8, got float32 (6, 16, 2)"),
    ({"output_scale": 2.0 * torch.ones(1)}, ValueError, "output_scale must be float32 [], got float32 (1,)"),
    ({"output_scale": ONE.double()}, TypeError, "output_scale must be float32 [], got float64 ()"),
    ({"output_scale": ONE.to("meta")}, ValueError, "output_scale must be on cpu like the first, got one on meta"),
]
SCALE_CACHES = {"k_scale_cache": torch.ones(6, 16, 2), "v_scale_cache": torch.ones(6, 16, 2)}
BAD_SCALES = [
    (FP8, {"k_scale": torch.ones(4)}, ValueError, "k_scale must be float32 [] or [Hkv = 2], got float32 (4,)"),
    (FP8, {"v_scale": ONE.half()}, TypeError, "v_scale must be float32 [] or [Hkv = 2], got float16 ()"),
    (FP8, {"v_scale": ONE, **SCALE_CACHES}, ValueError, "v_scale must be None where there is a k_scale_cache, got float32 ()"),
    (FP8, {"k_scale_cache": torch.ones(6, 16, 2)}, ValueError, "v_scale_cache must be given where k_scale_cache is, and only there, got None"),
    (FP8, {"v_scale_cache": torch.ones(6, 16, 2)}, ValueError, "v_scale_cache must be given where k_scale_cache is, and only there, got float32 (6, 16, 2)"),
    (FP8, SCALE_CACHES | {"k_scale_cache": torch.ones(6, 16)}, ValueError, "k_scale_cache must be float32 [N, P, Hkv], got float32 (6, 16)"),
    (FP8, SCALE_CACHES | {"v_scale_cache": torch.ones(6, 2, 16)}, ValueError, "v_scale_cache must be [N, P, Hkv] = (6, 16, 2) like key_cache, got float32 (6, 2, 16)"),
    (torch.int8, {}, ValueError, "k_scale_cache must be given where the caches are int8, got None"),
    (torch.int8, {"k_scale": ONE}, ValueError, "k_scale must be None where the caches are not float8, got float32 ()"),
]
# fmt: on


@pytest.mark.parametrize(("argument", "spoil", "error", "says"), BAD)
def test_bad_input_is_named(argument, spoil, error, says) -> None:
    kwargs = batch_arguments()
    kwargs[argument] = spoil(kwargs[argument])
    with pytest.raises(error) as caught:
        torch_tkv.paged_attention(**kwargs)
    assert str(caught.value) == f"paged_attention: {says}"


@pytest.mark.parametrize(("options", "error", "says"), BAD_OPTIONS)
def test_options_that_do_not_fit_are_named(options, error, says) -> None:
    with pytest.raises(error) as caught:
        torch_tkv.paged_attention(**batch_arguments(), **options)
    assert str(caught.value) == f"paged_attention: {says}"


@pytest.mark.parametrize(("cache_dtype", "scales", "error", "says"), BAD_SCALES)
def test_scales_that_do_not_fit_the_cache_are_named(cache_dtype, scales, error, says) -> None:
    batch = make_batch([5, 20], [1, 3], cache_dtype=cache_dtype)
    with pytest.raises(error) as caught:
        torch_tkv.paged_attention(*batch, **scales)
    assert str(caught.value) == f"paged_attention: {says}"


def test_autograd_is_refused_with_the_way_out() -> None:
    kwargs = batch_arguments()
    kwargs["query"].requires_grad_()
    with pytest.raises(
        NotImplementedError, match=r"paged_attention: there is no backward.*no_grad"
    ):
        torch_tkv.paged_attention(**kwargs)
    kwargs["query"].requires_grad_(False)
    with pytest.raises(NotImplementedError, match="there is no backward"):
        torch_tkv.paged_attention(**kwargs, query_bias=torch.zeros(4, 3, requires_grad=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_accepts_contiguous_sliced_and_permuted_inputs(layout: str) -> None:
    batch = make_batch([5, 9, 3], [1, 4, 3], layout=layout)
    sliced = torch.randn(8, 4, 48)[..., 16:32]
    permuted = torch.randn(4, 8, 16).transpose(0, 1)
    for query in (batch.query, sliced, permuted):
        args = batch._replace(query=query)
        torch.library.opcheck(torch.ops.tkv.paged_attention, (*args, 0.25))


def test_opcheck_accepts_every_option() -> None:
    batch = make_batch([5, 9, 3], [1, 4, 3], cache_dtype=torch.int8)
    options = make_modifiers(batch, MODIFIERS) | make_scales(batch, "per token and head")
    operator = torch.ops.tkv.paged_attention
    torch.library.opcheck(operator, (*batch, 0.25), options | {"window": 4})
    batch = make_batch([5, 9, 3], [1, 4, 3], cache_dtype=FP8)
    options = make_scales(batch, "per head") | {"output_scale": ONE}
    # The other utilities compute with float8 tensors, which PyTorch does not.
    torch.library.opcheck(operator, (*batch, 0.25), options, test_utils="test_faketensor")


def test_the_operator_compiles_without_a_graph_break_and_with_dynamic_shapes() -> None:
    compiled = torch.compile(torch_tkv.paged_attention, fullgraph=True, dynamic=True)
    for seq_lens, query_lens in (([5, 9, 3], [1, 4, 3]), ([7, 40], [7, 2])):
        batch = make_batch(seq_lens, query_lens)
        options = make_modifiers(batch, MODIFIERS) | {"window": 6}
        expected = torch_tkv.paged_attention(*batch, **options)
        torch.testing.assert_close(compiled(*batch, **options), expected)
