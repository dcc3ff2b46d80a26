from __future__ import annotations

import itertools
import math
import random
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from paged import (
    HAS_BF16_DOT,
    LAYOUTS,
    MODIFIERS,
    SCALES,
    Batch,
    assert_as_accurate,
    make_batch,
    make_caches,
    make_modifiers,
    make_scales,
    options_on,
)
from torch import Tensor

import torch_tkv
from torch_tkv import reference
from torch_tkv.kernels import attention_plans as plans
from torch_tkv.kernels import paged_attention as kernel
from torch_tkv.kernels.attention_geometry import Plan, complete
from torch_tkv.kernels.device import Device
from torch_tkv.kernels.launcher import run

pytestmark = pytest.mark.usefixtures("poisoned_empty")

HAS_GPU = torch.cuda.is_available()
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            not HAS_BF16_DOT, reason="Triton's interpreter multiplies the bits of bfloat16"
        ),
    ),
]
# The interpreter takes a few. Random calls cover more pairs of these, and other dtypes.
HALF = torch.bfloat16 if HAS_BF16_DOT else torch.float16
HEADS = [(71, 1), (14, 2)]
SIZES = [(46, 46), (96, 64), (256, 256)]
BLOCK_SIZES = [3, 256]
if HAS_GPU:
    HEADS += [(1, 1), (8, 1), (28, 4), (64, 8)]
    SIZES += [(d, d) for d in (8, 48, 64, 80, 112, 128, 192)] + [(192, 128), (64, 256)]
    BLOCK_SIZES += [1, 2, 16, 32, 64, 128]
FLOAT8S = [torch.float8_e4m3fn, torch.float8_e5m2]
# Dtypes of a cache of 8 bits and kinds of its scales. The interpreter misreads float8.
CODES = [(torch.int8, "per token and head")]
if HAS_GPU:
    CODES += [(dtype, kind) for dtype in FLOAT8S for kind in (None, *SCALES)]
# Lengths and query lengths of batches with few new tokens, with few and many, with many only.
FEW = ([5, 33, 20, 0, 70, 9, 2], [1, 4, 0, 0, 12, 1, 3])
MIXED = ([5, 33, 0, 70, 2], [1, 4, 0, 75, 3])
PROMPT = ([50], [40])
# Many new tokens that are all decoded: tiles of some groups of heads begin within a token.
DRAFTS = ([20, 33, 17], [16, 13, 15])
LONG = ([700, 1, 900, 260], [500, 1, 90, 260])
# Other forms of the kernels than the default's: of Hopper, say.
SHAPES: list[dict[str, Any]] = [{}]
if HAS_GPU:
    SHAPES += [
        {"heads": (32, 8), "head_size": 128, "dtype": torch.bfloat16, "cache_dtype": dtype}
        for dtype in (torch.bfloat16, torch.float8_e4m3fn)
    ]


def launch(*args: Any, **kwargs: Any) -> Any:
    return run(kernel.prepare(*args, **kwargs))


def assert_kernel_is_as_accurate_as_reference(
    batch: Batch, device: str, *, scale: float = 0.2, **options: Any
) -> None:
    batch, options = batch.to(device), options_on(device, options)
    out = launch(*batch, scale, **options)
    expected = reference.paged_attention(*batch, scale, **options)
    assert out.dtype == expected.dtype
    output_scale = options.pop("output_scale", None)
    exact = reference.paged_attention(*batch.double(), scale, **options)
    if output_scale is not None:
        out, exact = out.float(), (exact / output_scale).clamp(-448, 448)
    assert_as_accurate(out, expected, exact)


class Space(NamedTuple):
    """What random calls are drawn from."""

    heads: list[tuple[int, int]]
    sizes: list[tuple[int, int]]
    block_sizes: list[int]
    dtypes: list[torch.dtype]
    codes: list[tuple[torch.dtype, str | None]]
    longest_context: int
    longest_prefill: int
    most_sequences: int


FEW_HEADS = [(1, 1), (2, 1), (4, 1), (4, 4), (7, 1), (8, 1)]
SPACE = Space(
    heads=HEADS + FEW_HEADS if HAS_GPU else FEW_HEADS,
    sizes=[(8, 8), (16, 16), (24, 16), (16, 40), (46, 46), *(SIZES if HAS_GPU else ())],
    block_sizes=BLOCK_SIZES if HAS_GPU else [1, 3, 8, 16],
    dtypes=[torch.float32, torch.float16, *([torch.bfloat16] if HAS_BF16_DOT else ())],
    codes=CODES,
    longest_context=2000 if HAS_GPU else 60,
    longest_prefill=500 if HAS_GPU else 30,
    most_sequences=8 if HAS_GPU else 3,
)


def random_call(seed: int, space: Space) -> tuple[Batch, dict[str, Any]]:
    """Return a random batch and random options."""
    rng = random.Random(seed)
    forms = {
        "nothing": lambda: 0,
        "decode": lambda: 1,
        "drafts": lambda: rng.randint(2, 16),
        "prefill": lambda: rng.randint(17, space.longest_prefill),
    }
    present = rng.choice([["decode"], ["drafts"], ["prefill"], list(forms)])
    count = rng.randint(1, space.most_sequences)
    query_lens = [forms[rng.choice(present)]() for _ in range(count)]
    contexts = [rng.choice([0, rng.randint(1, space.longest_context)]) for _ in range(count)]
    seq_lens = [n + context for n, context in zip(query_lens, contexts, strict=True)]
    if rng.random() < 0.1:
        seq_lens[0] //= 2  # fewer keys than queries

    causal = rng.random() < 0.8
    window = rng.choice([None, None, 1, 7, 64, 1000]) if causal else None
    cache_dtype, scales = rng.choice([(None, None), rng.choice(space.codes)])
    size, value_size = rng.choice(space.sizes)
    layouts = [layout for layout in LAYOUTS if size == value_size or layout[0] != "["]
    batch = make_batch(
        seq_lens,
        query_lens,
        heads=rng.choice(space.heads),
        head_size=size,
        value_size=value_size,
        block_size=rng.choice(space.block_sizes),
        layout=rng.choice(layouts),
        dtype=rng.choice(space.dtypes),
        cache_dtype=cache_dtype,
        index_dtype=rng.choice([torch.int32, torch.int64]),
        padding=rng.choice([0, 5]),
        window=window,
    )
    modifiers = [name for name in MODIFIERS if rng.random() < 0.3]
    options = make_modifiers(batch, modifiers, width=rng.choice([0, 3, 16]))
    options |= make_scales(batch, scales, window=window)
    if HAS_GPU and rng.random() < 0.2:
        options["output_scale"] = torch.tensor(rng.choice([0.01, 0.3]))
    return batch, options | {"causal": causal, "window": window}


@pytest.mark.parametrize("seed", range(100 if HAS_GPU else 8))
def test_a_random_call_is_right(device: str, seed: int) -> None:
    torch.manual_seed(seed)
    batch, options = random_call(seed, SPACE)
    assert_kernel_is_as_accurate_as_reference(batch, device, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mixed_batch_is_right_in_every_layout(
    device: str, layout: str, dtype: torch.dtype
) -> None:
    batch = make_batch(*MIXED, layout=layout, dtype=dtype, block_size=8, padding=3)
    assert_kernel_is_as_accurate_as_reference(batch, device)


@pytest.mark.parametrize(("form", "causal"), [(FEW, False), (MIXED, True), (PROMPT, False)])
@pytest.mark.parametrize("names", [*((name,) for name in MODIFIERS), MODIFIERS])
def test_every_modifier_alone_and_together_is_right(
    device: str, names: tuple[str, ...], form, causal: bool
) -> None:
    batch = make_batch(*form, block_size=8, padding=3)
    options = make_modifiers(batch, names)
    assert_kernel_is_as_accurate_as_reference(batch, device, causal=causal, **options)


@pytest.mark.parametrize("form", [FEW, MIXED])
@pytest.mark.parametrize("window", [1, 13, 64])
def test_keys_before_the_window_are_not_seen_and_may_be_anything(
    device: str, window: int, form
) -> None:
    batch = make_batch(*form, block_size=8, window=window)
    assert_kernel_is_as_accurate_as_reference(batch, device, window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("cache_dtype", "kind"), CODES)
def test_caches_of_8_bits_are_right_with_every_kind_of_scale(
    device: str, dtype: torch.dtype, cache_dtype: torch.dtype, kind: str | None
) -> None:
    sizes = {"head_size": 48, "layout": "packed", "block_size": 8}
    batch = make_batch(*MIXED, **sizes, dtype=dtype, cache_dtype=cache_dtype)
    assert_kernel_is_as_accurate_as_reference(batch, device, **make_scales(batch, kind))


@pytest.mark.gpu
@pytest.mark.parametrize("exponent", [-110, -20, 20, 110])
@pytest.mark.parametrize(("cache_dtype", "kind"), CODES)
def test_queries_of_any_size_meet_caches_of_8_bits(
    cache_dtype: torch.dtype, kind: str | None, exponent: int
) -> None:
    sizes = {"head_size": 64, "dtype": torch.bfloat16, "cache_dtype": cache_dtype}
    batch = make_batch(*MIXED, **sizes)
    large = batch._replace(query=batch.query * 2.0**exponent)
    options = make_scales(batch, kind)
    assert_kernel_is_as_accurate_as_reference(large, "cuda", scale=0.2 * 2.0**-exponent, **options)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("head_size", "block_size", "window"),
    [(64, 256, None), (80, 8, 99), (128, 16, 99), (256, 64, None)],
)
@pytest.mark.parametrize(("cache_dtype", "kind"), CODES)
def test_prompts_meet_caches_of_8_bits(
    cache_dtype: torch.dtype,
    kind: str | None,
    head_size: int,
    block_size: int,
    window: int | None,
) -> None:
    sizes = {"heads": (8, 2), "head_size": head_size, "block_size": block_size, "window": window}
    batch = make_batch(*LONG, **sizes, dtype=torch.bfloat16, cache_dtype=cache_dtype, padding=3)
    options = {"window": window, **make_scales(batch, kind, window=window)}
    assert_kernel_is_as_accurate_as_reference(batch, "cuda", **options)


@pytest.mark.gpu
@pytest.mark.parametrize(("head_size", "value_size"), [(45, 45), (64, 45), (45, 64)])
@pytest.mark.parametrize(("cache_dtype", "kind"), CODES)
def test_rows_of_8_bits_that_are_no_pairs_are_right(
    cache_dtype: torch.dtype, kind: str | None, head_size: int, value_size: int
) -> None:
    sizes = {"head_size": head_size, "value_size": value_size}
    batch = make_batch(*MIXED, **sizes, dtype=torch.bfloat16, cache_dtype=cache_dtype)
    assert_kernel_is_as_accurate_as_reference(batch, "cuda", **make_scales(batch, kind))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(8, 1), (32, 8)])
@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
@pytest.mark.parametrize(
    "lengths", [[30000], [30000, *[40] * 20], [30000, *[40] * 90], [9000] * 3, [700] * 300]
)
@pytest.mark.parametrize("drafts", [1, 4])
def test_many_partial_results_of_one_sequence_or_of_many_are_merged(
    drafts: int, lengths: list[int], cache_dtype: torch.dtype | None, heads: tuple[int, int]
) -> None:
    sizes = {"heads": heads, "head_size": 64, "dtype": torch.float16, "cache_dtype": cache_dtype}
    batch = make_batch(lengths, [drafts] * len(lengths), **sizes, padding=3)
    options = make_scales(batch, "per token and head") if cache_dtype else {}
    assert_kernel_is_as_accurate_as_reference(batch, "cuda", **options)


@pytest.mark.gpu
@pytest.mark.parametrize("form", [FEW, MIXED])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("output_scale", [0.002, 0.01, 0.4])
@pytest.mark.parametrize("head_size", [16, 64])
def test_an_output_scale_divides_saturates_and_rounds_to_float8(
    dtype: torch.dtype, head_size: int, output_scale: float, form
) -> None:
    batch = make_batch(*form, dtype=dtype, head_size=head_size, padding=3)
    options = {"output_scale": torch.tensor(output_scale)}
    assert_kernel_is_as_accurate_as_reference(batch, "cuda", **options)


@pytest.mark.parametrize("heads", HEADS)
def test_any_group_of_query_heads_is_right(device: str, heads: tuple[int, int]) -> None:
    batch = make_batch(*MIXED, heads=heads, dtype=HALF)
    assert_kernel_is_as_accurate_as_reference(batch, device)


@pytest.mark.parametrize("form", [DRAFTS, MIXED, *([LONG] if HAS_GPU else ())])
@pytest.mark.parametrize("head_size", [16, *([64, 128] if HAS_GPU else ())])
@pytest.mark.parametrize("group", [3, 5, 71])
@pytest.mark.parametrize("option", ["not causal", "window", "softcap", "query_bias"])
def test_tiles_that_begin_within_a_token_are_right(
    device: str, option: str, group: int, head_size: int, form
) -> None:
    window = 13 if option == "window" else None
    sizes = {"heads": (group, 1), "head_size": head_size, "block_size": 8, "padding": 3}
    dtype = torch.float32 if head_size == 16 else HALF
    batch = make_batch(*form, **sizes, dtype=dtype, window=window)
    options = make_modifiers(batch, [option]) if option in MODIFIERS else {}
    options |= {"causal": option != "not causal", "window": window}
    assert_kernel_is_as_accurate_as_reference(batch, device, **options)


@pytest.mark.parametrize("sizes", SIZES)
def test_any_head_size_is_right(device: str, sizes: tuple[int, int]) -> None:
    batch = make_batch(*MIXED, head_size=sizes[0], value_size=sizes[1], dtype=HALF)
    assert_kernel_is_as_accurate_as_reference(batch, device)


@pytest.mark.parametrize(
    ("block_size", "index_dtype"), zip(BLOCK_SIZES, itertools.cycle([torch.int32, torch.int64]))
)
def test_any_block_size_and_index_dtype_is_right(
    device: str, block_size: int, index_dtype: torch.dtype
) -> None:
    batch = make_batch(*MIXED, block_size=block_size, index_dtype=index_dtype)
    assert_kernel_is_as_accurate_as_reference(batch, device)


def test_strided_queries_indices_and_biases_are_followed(device: str) -> None:
    batch = make_batch(*MIXED)
    columns = [torch.stack((x, x + 10**6), -1)[..., 0] for x in batch[3:]]
    query = torch.cat((batch.query, batch.query + 1), -1)[..., :16]
    strided = Batch(query, *batch[1:3], *columns)
    assert all(not tensor.is_contiguous() for tensor in (query, *columns))
    bias = torch.randn(query.shape[0], 9)[:, 2:6]
    assert_kernel_is_as_accurate_as_reference(strided, device, query_bias=bias)


@pytest.mark.parametrize("most", [1, 4])
@pytest.mark.parametrize("seqs", [300, 1100] if HAS_GPU else [20])
def test_many_sequences_find_their_tiles(device: str, seqs: int, most: int) -> None:
    lens = torch.randint(0, most + 1, (seqs,)).tolist()
    batch = make_batch([n + 2 for n in lens], lens, heads=(1, 1), block_size=4, padding=70)
    assert_kernel_is_as_accurate_as_reference(batch, device)


def test_an_empty_batch_gives_an_empty_output(device: str) -> None:
    batch = make_batch([], []).to(device)
    assert launch(*batch, 1.0).shape == (0, 4, 16)
    padded = batch._replace(query=torch.randn(5, 4, 16, device=device))
    assert (launch(*padded, 1.0) == 0).all()


@pytest.mark.parametrize(
    ("seq_lens", "query_lens"), [([0, 0], [1, 1]), ([0, 0], [30, 3]), ([9, 9], [0, 0])]
)
def test_sequences_without_keys_or_queries_give_zeros(device: str, seq_lens, query_lens) -> None:
    batch = make_batch(seq_lens, query_lens, padding=4).to(device)
    assert (launch(*batch, 1.0) == 0).all()


@pytest.mark.parametrize("query_lens", [[5, 1], [40, 1]])
@pytest.mark.parametrize("sink", [-torch.inf, 1000.0])
def test_queries_that_see_no_key_give_zeros_whatever_the_sinks_are(
    device: str, query_lens: list[int], sink: float
) -> None:
    batch = make_batch([2, 0], query_lens).to(device)
    sinks = torch.full((4,), sink, device=device)
    out = launch(*batch, 0.2, sinks=sinks)
    torch.testing.assert_close(out, reference.paged_attention(*batch, 0.2, sinks=sinks))
    hidden = torch.full((sum(query_lens), 40), -torch.inf, device=device)
    assert (launch(*batch, 0.2, sinks=sinks, query_bias=hidden) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks_have_any_float_dtype(device: str, dtype: torch.dtype) -> None:
    batch = make_batch(*FEW, dtype=torch.float16)
    sinks = torch.randn(4).to(dtype)
    assert_kernel_is_as_accurate_as_reference(batch, device, sinks=sinks)


def test_large_scores_do_not_overflow(device: str) -> None:
    batch = make_batch(*MIXED)
    assert_kernel_is_as_accurate_as_reference(batch, device, scale=300.0)


def test_a_query_of_nan_gives_nan_and_leaves_the_others_alone(device: str) -> None:
    batch = make_batch(*MIXED)
    batch.query[0, 0] = torch.nan
    batch.query[20, 1] = torch.nan
    out = launch(*batch.to(device), 0.2).isnan()
    assert out[0, 0].all()
    assert out[20, 1].all()
    assert out.sum() == 2 * 16


def finite(cache: Tensor) -> Tensor:
    return torch.nan_to_num(cache.float(), posinf=0.0, neginf=0.0).to(cache.dtype)


def guarded(batch: Batch) -> Batch:
    """Return a batch of finite caches that lie between guard regions of NaN."""
    caches = []
    for cache in batch[1:3]:
        n = cache.shape[0]
        guard = torch.full((3 * n, *cache.shape[1:]), torch.nan, device=cache.device)
        guard = guard.to(cache.dtype)
        guard[n : 2 * n] = finite(cache)
        caches.append(guard[n : 2 * n])
    return batch._replace(key_cache=caches[0], value_cache=caches[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("garbage", [-1, 2**31 - 1, 2**62, -(2**63), None])
def test_a_block_outside_the_cache_reads_as_zeros(
    device: str, garbage: int | None, shape: dict[str, Any]
) -> None:
    """None is the first block behind the cache."""
    batch = guarded(make_batch(*MIXED, block_size=8, index_dtype=torch.int64, **shape).to(device))
    n = batch.key_cache.shape[0]
    wild = torch.full_like(batch.block_table, n if garbage is None else garbage)
    spoilt = torch.rand(wild.shape, device=device) < 0.5
    table = torch.where(spoilt, wild, batch.block_table)
    out = launch(*batch._replace(block_table=table), 0.2)
    padded = [torch.cat((c, torch.zeros_like(c[:1]))) for c in batch[1:3]]
    zeros = torch.where(spoilt, torch.full_like(wild, n), batch.block_table)
    clean = batch._replace(key_cache=padded[0], value_cache=padded[1], block_table=zeros)
    expected = reference.paged_attention(*clean, 0.2)
    assert_as_accurate(out, expected, reference.paged_attention(*clean.double(), 0.2))


@pytest.mark.parametrize("shape", SHAPES)
def test_starts_that_descend_read_no_row_behind_the_block_table(
    device: str, shape: dict[str, Any]
) -> None:
    batch = make_batch([200, 8], [200, 0], block_size=8, **shape).to(device)
    caches = [torch.cat((finite(c), torch.full_like(c[:1], 400.0))) for c in batch[1:3]]
    table = torch.cat(
        (batch.block_table, torch.full_like(batch.block_table[:1], len(caches[0]) - 1))
    )
    starts = torch.tensor([0, 200, 0], dtype=torch.int32, device=device)
    out = launch(batch.query, *caches, table[:2], batch.seq_lens, starts, 0.2)
    assert not (out.abs() > 100).any()  # rows that no sequence has alone stay as they were


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("garbage", [-1, 2**31 - 1, 2**62, -(2**63)] if HAS_GPU else [-1])
def test_garbage_lengths_and_starts_read_nothing_outside_the_caches(
    device: str, garbage: int, shape: dict[str, Any]
) -> None:
    batch = guarded(make_batch(*MIXED, block_size=8, index_dtype=torch.int64, **shape).to(device))
    n = batch.key_cache.shape[0]
    batch = batch._replace(block_table=batch.block_table.clamp(0, n - 1))
    wild = torch.full_like(batch.seq_lens, garbage)
    assert not launch(*batch._replace(seq_lens=wild), 0.2).isnan().any()
    starts = torch.full_like(batch.query_start_loc, garbage)
    some = starts.where(torch.rand(starts.shape, device=device) < 0.5, batch.query_start_loc)
    for query_start_loc in (starts, some, batch.query_start_loc.flip(0)):
        launch(*batch._replace(query_start_loc=query_start_loc), 0.2)


@pytest.mark.gpu
@pytest.mark.parametrize("query_lens", [[1] * 9, [4] * 9, [300] * 9, [1] * 7 + [300, 5]])
def test_results_are_identical_from_run_to_run(query_lens: list[int]) -> None:
    seq_lens = [5000, 300, 301, 17, 2000, 900, 16, 5001, 5]
    seq_lens = [max(pair) for pair in zip(seq_lens, query_lens, strict=True)]
    batch = make_batch(seq_lens, query_lens, heads=(32, 8), head_size=128, dtype=torch.bfloat16).to(
        "cuda"
    )
    out = torch_tkv.paged_attention(*batch)
    for _ in range(200):
        assert torch.equal(torch_tkv.paged_attention(*batch), out)


class Step:
    """One attention layer of a step: writes new keys and values, then attends."""

    def __init__(self, tokens: int, seqs: int, *, window: int | None) -> None:
        self.num_blocks, self.block_size, self.window = 80, 16, window
        self.query = torch.randn(tokens, 8, 64, device="cuda").bfloat16()
        self.key, self.value = torch.randn(2, tokens, 2, 64, device="cuda").bfloat16()
        self.caches = make_caches(
            "HND", self.num_blocks, 16, 2, 64, dtype=torch.bfloat16, device="cuda"
        )
        self.slots = torch.zeros(tokens, dtype=torch.int64, device="cuda")
        self.table = torch.zeros(seqs, 40, dtype=torch.int32, device="cuda")
        self.seq_lens = torch.zeros(seqs, dtype=torch.int32, device="cuda")
        self.starts = torch.zeros(seqs + 1, dtype=torch.int32, device="cuda")

    def __call__(self, caches: tuple[Tensor, Tensor]) -> Tensor:
        torch_tkv.reshape_and_cache(self.key, self.value, *caches, self.slots)
        return torch_tkv.paged_attention(
            self.query, *caches, self.table, self.seq_lens, self.starts, window=self.window
        )

    def change(self, rng: random.Random) -> None:
        """Put other contents into all inputs, in place."""
        tokens, seqs = self.query.shape[0], self.seq_lens.shape[0]
        cuts = sorted(rng.randint(0, tokens) for _ in range(seqs))
        if tokens == seqs and rng.random() < 0.8:
            cuts = list(range(1, seqs + 1))  # decode
        counts = [end - start for start, end in zip([0, *cuts], cuts, strict=False)]
        longest = self.table.shape[1] * self.block_size
        lengths = [min(n + rng.choice([0, rng.randint(0, longest)]), longest) for n in counts]
        slots = torch.randperm(self.num_blocks * self.block_size)[:tokens]
        slots[torch.rand(tokens) < 0.1] = -1
        self.query.normal_()
        self.key.normal_()
        self.value.normal_()
        self.slots.copy_(slots)
        self.table.copy_(torch.randint(self.num_blocks, self.table.shape))
        self.seq_lens.copy_(torch.tensor(lengths))
        self.starts.copy_(torch.tensor([0, *cuts]))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("tokens", "seqs"), [(6, 6), (24, 6), (400, 6)])
def test_a_thousand_replays_of_one_graph_equal_eager_calls(
    tokens: int, seqs: int, window: int | None
) -> None:
    step, rng = Step(tokens, seqs, window=window), random.Random(0)
    step(step.caches)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(step.caches)
    for _ in range(1000):
        step.change(rng)
        caches = tuple(cache.clone() for cache in step.caches)
        expected = step(caches)
        graph.replay()
        assert torch.equal(out, expected)
    for cache, written in zip(step.caches, caches, strict=True):
        assert torch.equal(cache, written)


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
def test_two_streams_run_the_operator_at_once(captured: bool) -> None:
    batches = [
        make_batch(
            [4096, 3000, 5000, 64], query_lens, heads=(32, 8), head_size=128, dtype=torch.bfloat16
        ).to("cuda")
        for query_lens in ([1, 1, 1, 1], [1, 200, 1, 5])
    ]
    expected = [torch_tkv.paged_attention(*batch) for batch in batches]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in batches]
    graphs, outs = [torch.cuda.CUDAGraph() for _ in batches], []
    for batch, graph in zip(batches, graphs, strict=True):
        with torch.cuda.graph(graph):
            outs.append(torch_tkv.paged_attention(*batch))
    for _ in range(20):
        results: list[list[Tensor]] = [[], []]
        for _ in range(20):
            for i, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    if captured:
                        graphs[i].replay()
                        results[i].append(outs[i].clone())
                    else:
                        results[i].append(torch_tkv.paged_attention(*batches[i]))
        torch.cuda.synchronize()
        for right, got in zip(expected, results, strict=True):
            assert all(torch.equal(out, right) for out in got)


BASE = Plan(
    page=16,
    group=4,
    size=128,
    value_size=128,
    key_strides=(16384, 1024, 128),
    value_strides=(16384, 1024, 128),
    causal=True,
    window=None,
    softcap=None,
    block_d=128,
    block_dv=128,
)
H200 = Device(arch=90, processors=132)


@pytest.mark.parametrize(
    ("tokens", "seqs", "decode", "prefill"),
    [
        (32, 32, True, False),
        (1, 1, True, False),
        (128, 32, True, False),
        (16, 1, True, False),
        (1024, 1, False, True),
        (1025, 9, True, True),
        (0, 0, True, False),
    ],
)
def test_a_part_is_launched_where_the_shapes_call_for_it(
    tokens: int, seqs: int, decode: bool, prefill: bool
) -> None:
    assert plans.parts(tokens, seqs) == (decode, prefill)


def plan_decode(**sizes: int) -> Plan:
    sizes = {"tokens": 32, "seqs": 32, "kv_heads": 8, "bits": 16, "max_keys": 4096} | sizes
    base = BASE._replace(group=sizes.pop("group", 4))
    return plans.plan_decode(base, H200, **sizes).plan


def test_the_decoding_grid_is_one_wave() -> None:
    for kv_heads, workers in ((8, 33), (4, 66), (1, 264), (16, 16), (13, 20)):
        assert plan_decode(kv_heads=kv_heads).workers == workers
    assert plan_decode(tokens=1, seqs=1, max_keys=1024).workers == 16
    assert plan_decode(kv_heads=1000).workers == 1


def test_the_heads_of_a_group_and_the_new_tokens_share_a_tile() -> None:
    plan = plan_decode()
    assert (plan.block_m, plan.tile_rows, plan.block_n, plan.max_queries) == (16, 16, 64, None)
    drafts = plan_decode(tokens=128, group=8)
    assert (drafts.block_m, drafts.tile_rows) == (32, 32)
    odd = plan_decode(group=71)
    assert (odd.block_m, odd.tile_rows, odd.block_n) == (128, 71, 64)
    for tokens, tile_rows in ((64, 71), (96, 128)):  # 2 and 3 a sequence
        assert plan_decode(tokens=tokens, group=71).tile_rows == tile_rows
    mixed = plan_decode(tokens=1025, seqs=9)
    assert (mixed.block_m, mixed.max_queries) == (16, plans.MAX_DECODED)
    assert plan_decode(tokens=16, seqs=16, bits=8).block_n == 128


def test_many_sequences_of_8_bits_are_decoded_by_more_and_smaller_programs() -> None:
    many = {"tokens": 128, "seqs": 128}
    config = plans.plan_decode(
        BASE._replace(group=4), H200, **many, kv_heads=8, bits=8, max_keys=1024
    )
    assert (config.num_warps, config.plan.block_n, config.plan.workers) == (2, 64, 66)
    assert plan_decode(**many).workers == 33
    for seqs, workers in ((16, 33), (17, 66)):
        assert plan_decode(tokens=seqs, seqs=seqs, bits=8).workers == workers


def test_kernels_take_of_a_plan_what_triton_3_9_knows_the_fields() -> None:
    sources = [path.read_text() for path in Path(plans.__file__).parent.glob("*.py")]
    used = {name for source in sources for name in re.findall(r"\bplan\.(\w+)", source)}
    assert {"tile_tokens", "numbers"} < used
    assert used - {"_replace"} <= {*Plan._fields}


def test_a_tile_has_rows_of_as_many_tokens_as_are_counted() -> None:
    for group, tile_rows in itertools.product([1, 3, 4, 5, 7, 48, 71, 128, 200], [64, 128, 192]):
        plan = complete(BASE._replace(page=16, block_n=64, group=group, tile_rows=tile_rows))
        firsts = range(0, math.lcm(group, tile_rows), tile_rows)
        tokens = [(row + tile_rows - 1) // group - row // group + 1 for row in firsts]
        assert plan.most_tokens == max(tokens)


def test_a_tile_has_a_block_number_for_each_block_or_for_each_key() -> None:
    for page, block_n, pairs, numbers in (
        (16, 64, None, 4),
        (64, 64, None, 1),
        (256, 64, None, 1),
        (1, 64, None, 64),
        (24, 64, None, 64),
        (16, 128, None, 8),
        (16, 128, "int8", 128),
        (16, 64, "int8", 4),
    ):
        sizes = {"page": page, "block_n": block_n, "tile_rows": 16}
        assert complete(BASE._replace(**sizes, pairs=pairs)).numbers == numbers


def test_rows_of_8_bits_are_read_in_pairs_where_they_consist_of_them() -> None:
    even, odd = (torch.empty(5, 16, 2, size, dtype=torch.int8) for size in (48, 45))
    shifted = torch.empty(5, 16, 2, 49, dtype=torch.int8)[..., 1:]
    query = torch.empty(3, 4, 48, dtype=torch.bfloat16)
    assert kernel._pairs((even, even), query, H200) == "int8"
    for caches in ((even, odd), (odd, even), (shifted, even), (even, shifted)):
        assert kernel._pairs(caches, query, H200) is None
    assert kernel._pairs((even, even), query.float(), H200) is None
    assert kernel._pairs((even, even), query, Device(arch=0, processors=304)) is None
    assert kernel._pairs((query[None],) * 2, query, H200) is None


def test_narrow_heads_are_computed_as_wider_ones() -> None:
    narrow = BASE._replace(block_d=16, block_dv=16)
    a100 = Device(arch=80, processors=108)
    sizes = {"tokens": 32, "seqs": 32, "kv_heads": 8, "max_keys": 4096}
    for group, pairs, device, widths in (
        (4, None, H200, (16, 16)),
        (4, "int8", H200, (32, 16)),
        (64, None, H200, (64, 64)),
        (64, "int8", H200, (128, 128)),
        (64, "int8", a100, (32, 16)),
    ):
        base = narrow._replace(group=group, pairs=pairs)
        plan = plans.plan_decode(base, device, **sizes, bits=8 if pairs else 16).plan
        assert (plan.block_d, plan.block_dv, plan.pairs) == (*widths, pairs)
    sizes = {"tokens": 1024, "seqs": 1}
    for bits, device, width in ((16, H200, 64), (32, H200, 16), (16, a100, 16)):
        base = narrow._replace(pairs="int8")
        plan = plans.plan_prefill(base, device, **sizes, bits=bits).plan
        assert (plan.block_d, plan.block_dv, plan.pairs) == (width, width, None)


def test_few_sequences_merge_more_partial_results_at_once() -> None:
    for tokens, seqs, merge in (
        (0, 0, (True, 1, 1, 16, 2)),
        (1, 1, (True, 1, 1, 16, 2)),
        (4, 4, (True, 4, 1, 8, 1)),
        (32, 32, (True, 32, 1, 9, 2)),
        (64, 64, (False, 33, 1, 9, 2)),
        (32 * 16, 32, (False, 33, 16, 2, 4)),
        (1025, 9, (False, 33, 1, 9, 2)),
    ):
        sizes = {"tokens": tokens, "seqs": seqs}
        assert plans.plan_merge(plan_decode(**sizes), **sizes) == merge
    long = plan_decode(tokens=1, seqs=1, max_keys=65536)
    assert plans.plan_merge(long, tokens=1, seqs=1) == (True, 1, 1, 33, 4)
    for seqs, num_warps in ((16, 2), (17, 1)):
        sizes = {"tokens": seqs, "seqs": seqs}
        pairs = plan_decode(**sizes)._replace(pairs="int8")
        assert plans.plan_merge(pairs, **sizes).num_warps == num_warps
    sizes = {"tokens": 32, "seqs": 32}
    odd = plan_decode(**sizes, kv_heads=1, group=71)
    assert plans.plan_merge(odd, **sizes) == (True, 32, 4, 8, 4)


def test_prefill_takes_the_tiles_that_fit_the_gpu() -> None:
    sizes = {"tokens": 1024, "seqs": 1, "bits": 16}
    hopper = plans.plan_prefill(BASE, H200, **sizes, hopper=True)
    assert (hopper.plan.block_m, hopper.plan.block_n, hopper.num_warps) == (128, 128, 4)
    for size, tile in ((64, (192, 128)), (256, (128, 64))):
        plan = plans.plan_prefill(BASE._replace(block_d=size), H200, **sizes, hopper=True).plan
        assert (plan.block_m, plan.block_n) == tile
    for size, tile in ((64, (128, 128)), (128, (128, 128)), (256, (128, 64))):
        base = BASE._replace(block_d=size, converts=True)
        plan = plans.plan_prefill(base, H200, **sizes, hopper=True).plan
        assert (plan.block_m, plan.block_n, plan.converts) == (*tile, True)
    large = plans.plan_prefill(BASE, H200, **sizes)
    assert (large.plan.block_m, large.plan.block_n, large.num_warps) == (128, 64, 8)
    small = plans.plan_prefill(BASE, Device(arch=89, processors=100), **sizes)
    assert (small.plan.block_m, small.plan.block_n, small.num_warps) == (64, 64, 4)
    odd = plans.plan_prefill(BASE._replace(group=71), H200, **sizes, hopper=True).plan
    assert (odd.block_m, odd.tile_rows) == (128, 128)
