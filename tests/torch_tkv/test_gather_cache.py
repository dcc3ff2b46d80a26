from __future__ import annotations

import pytest
import torch
from paged import LAYOUTS, make_caches
from torch import Tensor

import torch_tkv


def gather_by_loop(cache: Tensor, block_table: Tensor, starts: list[int], rows: int) -> Tensor:
    """Gather key by key: the meaning of the operator, spelled out."""
    block_size = cache.shape[1]
    out = torch.zeros(rows, *cache.shape[2:], dtype=cache.dtype)
    for b, blocks in enumerate(block_table.tolist()):
        for i in range(starts[b + 1] - starts[b]):
            out[starts[b] + i] = cache[blocks[i // block_size], i % block_size]
    return out


def arguments(layout: str = "NHD") -> dict[str, object]:
    key_cache, value_cache = make_caches(layout, 6, 4, 3, 8)
    return {
        "key_cache": key_cache,
        "value_cache": value_cache,
        "block_table": torch.tensor([[5, 0], [-7, 99], [2, 4], [1, 10**6]]),
        "cu_seq_lens": torch.tensor([0, 5, 5, 13, 14]),
        "num_tokens": 17,
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_sequences_follow_each_other_and_the_rows_behind_them_are_zeros(
    layout: str, index_dtype: torch.dtype
) -> None:
    kwargs = arguments(layout)
    kwargs["block_table"] = kwargs["block_table"].to(index_dtype)
    starts = kwargs["cu_seq_lens"].tolist()
    kwargs["cu_seq_lens"] = kwargs["cu_seq_lens"].to(index_dtype)
    key, value = torch_tkv.gather_cache(**kwargs)
    for rows, cache in ((key, kwargs["key_cache"]), (value, kwargs["value_cache"])):
        assert rows.is_contiguous()
        assert torch.equal(rows, gather_by_loop(cache, kwargs["block_table"], starts, 17))


def test_scales_multiply_in_float32_and_the_product_is_rounded_once() -> None:
    key_cache, value_cache = make_caches("NHD", 6, 4, 3, 8)
    key_cache = key_cache.to(torch.float8_e4m3fn)
    value_cache = value_cache.to(torch.float8_e5m2)
    k_scale, v_scale = torch.tensor(0.3), torch.tensor([0.7, 1.1, 3.0])
    indices = torch.tensor([[3, 1]]), torch.tensor([0, 6])
    key, value = torch_tkv.gather_cache(
        key_cache, value_cache, *indices, 6, k_scale=k_scale, v_scale=v_scale, dtype=torch.float16
    )
    slots = [12, 13, 14, 15, 4, 5]
    assert torch.equal(key, (key_cache.flatten(0, 1)[slots].float() * 0.3).half())
    expected = value_cache.flatten(0, 1)[slots].float() * v_scale[:, None]
    assert torch.equal(value, expected.half())


@pytest.mark.parametrize(
    ("cache_dtype", "dtype"),
    [
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.float8_e5m2, torch.bfloat16),
    ],
)
def test_the_dtype_is_the_key_caches_own_or_bfloat16_for_float8(
    cache_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    kwargs = arguments()
    kwargs["key_cache"] = kwargs["key_cache"].to(cache_dtype)
    key, value = torch_tkv.gather_cache(**kwargs)
    assert key.dtype == value.dtype == dtype
    assert torch.equal(key[0], kwargs["key_cache"][5, 0].to(dtype))
    assert torch.equal(value[0], kwargs["value_cache"][5, 0].to(dtype))


def test_the_parts_of_an_mla_cache_are_gathered_as_keys_and_values() -> None:
    cache = torch.randn(6, 4, 16 + 8)
    latent, rope = torch_tkv.gather_cache(
        cache[..., None, :16], cache[..., None, 16:], torch.tensor([[2]]), torch.tensor([0, 3]), 3
    )
    assert torch.equal(torch.cat((latent, rope), -1).squeeze(1), cache[2, :3])


# fmt: off
BAD = [
    ("key_cache", lambda t: t.double(), TypeError, "float32 or float16 or bfloat16 or float8_e4m3fn or float8_e5m2 [N, P, Hkv, D], got float64 (6, 4, 3, 8)"),
    ("value_cache", lambda t: t[0], ValueError, "float32 or float16 or bfloat16 or float8_e4m3fn or float8_e5m2 [N, P, Hkv, Dv], got float32 (4, 3, 8)"),
    ("value_cache", lambda t: t[:, :, :2], ValueError, "[N = 6, P = 4, Hkv = 3, Dv] like key_cache, got float32 (6, 4, 2, 8)"),
    ("key_cache", lambda t: t.transpose(2, 3), ValueError, "of last stride 1, got strides (96, 24, 1, 8)"),
    ("key_cache", lambda t: t[..., :0], ValueError, "[N, P, Hkv, D] with P, Hkv, D and Dv > 0, got float32 (6, 4, 3, 0)"),
    ("block_table", lambda t: t.float(), TypeError, "int32 or int64 [B, max_blocks], got float32 (4, 2)"),
    ("block_table", lambda t: t.to("meta"), ValueError, "on cpu like the first, got one on meta"),
    ("cu_seq_lens", lambda t: t[1:], ValueError, "[B + 1 = 5] like block_table, got int64 (4,)"),
    ("num_tokens", lambda n: -1, ValueError, "at least 0, got -1"),
    ("k_scale", lambda _: torch.ones(3).double(), TypeError, "float32 [] or [Hkv = 3], got float64 (3,)"),
    ("v_scale", lambda _: torch.ones(4), ValueError, "float32 [] or [Hkv = 3], got float32 (4,)"),
    ("dtype", lambda _: torch.int8, TypeError, "float32, float16 or bfloat16, got torch.int8"),
    ("cu_seq_lens", lambda t: t + 1, ValueError, "ascending from 0 to at most num_tokens = 17, got [1, 6, 6, 14, 15]"),
    ("cu_seq_lens", lambda t: t * 2, ValueError, "ascending from 0 to at most num_tokens = 17, got [0, 10, 10, 26, 28]"),
    ("cu_seq_lens", lambda t: torch.tensor([0, 9, 9, 9, 9]), ValueError, "of sequences of at most the 8 keys that block_table has room for, got [0, 9, 9, 9, 9]"),
    ("block_table", lambda t: t + 1, IndexError, "blocks of the cache's 6 wherever a sequence reaches, got [[6, 1], [-6, 100], [3, 5], [2, 1000001]]"),
]
# fmt: on


@pytest.mark.parametrize(("argument", "spoil", "error", "says"), BAD)
def test_bad_input_is_named(argument, spoil, error, says) -> None:
    kwargs = arguments()
    kwargs[argument] = spoil(kwargs.get(argument))
    with pytest.raises(error) as caught:
        torch_tkv.gather_cache(**kwargs)
    assert str(caught.value) == f"gather_cache: {argument} must be {says}"


def test_autograd_is_refused_with_the_way_out() -> None:
    kwargs = arguments()
    kwargs["key_cache"].requires_grad_()
    with pytest.raises(NotImplementedError, match=r"gather_cache: there is no backward.*no_grad"):
        torch_tkv.gather_cache(**kwargs)
    with torch.no_grad():
        torch_tkv.gather_cache(**kwargs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_accepts_every_layout_with_and_without_scales(layout: str) -> None:
    args = tuple(arguments(layout).values())
    for scales in ((), (torch.tensor(2.0), None), (None, torch.ones(6)[::2])):
        torch.library.opcheck(
            torch.ops.tkv.gather_cache, (*args, *scales), {"dtype": torch.bfloat16}
        )


def test_the_operator_compiles_without_a_graph_break_and_with_dynamic_shapes() -> None:
    compiled = torch.compile(torch_tkv.gather_cache, fullgraph=True, dynamic=True)
    kwargs = arguments()
    for rows in (14, 17, 23):
        kwargs["num_tokens"] = rows
        for one, other in zip(compiled(**kwargs), torch_tkv.gather_cache(**kwargs), strict=True):
            assert torch.equal(one, other)


@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_the_number_of_rows_may_be_read_from_a_tensor_inside_a_graph() -> None:
    def gather(cu_seq_lens: Tensor, **kwargs: Tensor) -> tuple[Tensor, Tensor]:
        num_tokens = int(cu_seq_lens[-1])
        return torch_tkv.gather_cache(cu_seq_lens=cu_seq_lens, num_tokens=num_tokens, **kwargs)

    kwargs = arguments()
    del kwargs["num_tokens"]
    compiled = torch.compile(gather, fullgraph=True)
    for one, other in zip(compiled(**kwargs), gather(**kwargs), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_a_captured_gather_replays_with_other_lengths_and_other_blocks() -> None:
    caches = make_caches("HND", 40, 16, 2, 32, dtype=torch.bfloat16, device="cuda")
    table = torch.zeros(5, 8, dtype=torch.int32, device="cuda")
    starts = torch.zeros(6, dtype=torch.int32, device="cuda")
    torch_tkv.gather_cache(*caches, table, starts, 500)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = torch_tkv.gather_cache(*caches, table, starts, 500)
    for _ in range(20):
        table.copy_(torch.randint(40, table.shape))
        starts[1:] = torch.randint(100, (5,)).cumsum(0)
        graph.replay()
        on_cpu = (tensor.cpu() for tensor in (*caches, table, starts))
        for out, right in zip(rows, torch_tkv.gather_cache(*on_cpu, 500), strict=True):
            assert torch.equal(out.cpu(), right)
