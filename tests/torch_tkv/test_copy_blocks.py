from __future__ import annotations

import pytest
import torch
from paged import LAYOUTS, clone_storages, make_caches, storage
from torch import Tensor

import torch_tkv


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_blocks_are_copied_and_nothing_else_changes(layout: str, index_dtype: torch.dtype) -> None:
    caches = make_caches(layout, 7, 4, 3, 8)
    expected = clone_storages(*caches)
    for cache in expected:
        cache[1], cache[6], cache[0] = cache[5], cache[5], cache[3]
    pairs = torch.tensor([[5, 1], [-1, 2], [3, 0], [4, -9], [2, 2], [5, 6]], dtype=index_dtype)
    torch_tkv.copy_blocks(*caches, pairs)
    for cache, copied in zip(caches, expected, strict=True):
        assert torch.equal(storage(cache), storage(copied))


def test_a_stacked_cache_is_copied_in_every_layer() -> None:
    kv = torch.randn(3, 2, 7, 4, 2, 8)
    key_cache, value_cache = kv.unbind(1)
    expected = kv.clone()
    expected[:, :, 6] = kv[:, :, 2]
    torch_tkv.copy_blocks(key_cache, value_cache, torch.tensor([[2, 6]]))
    assert torch.equal(kv, expected)


def test_caches_of_any_bits_and_scale_caches_are_copied_alike() -> None:
    key_cache = torch.randint(-128, 128, (5, 4, 3, 8), dtype=torch.int8)
    value_cache = torch.randn(5, 4, 3, 6).to(torch.float8_e5m2)
    scales = torch.randn(2, 5, 4, 3)
    pairs = torch.tensor([[0, 4]])
    torch_tkv.copy_blocks(key_cache, value_cache, pairs)
    torch_tkv.copy_blocks(scales[0, ..., None], scales[1, ..., None], pairs)
    for cache in (key_cache, value_cache.float(), *scales):
        assert torch.equal(cache[4], cache[0])


def arguments() -> dict[str, Tensor]:
    key_cache, value_cache = make_caches("NHD", 5, 4, 3, 8)
    pairs = torch.tensor([[0, 1], [0, 2]])
    return {"key_cache": key_cache, "value_cache": value_cache, "block_pairs": pairs}


# fmt: off
DTYPES = "float32 or float16 or bfloat16 or float8_e4m3fn or float8_e5m2 or int8"
BAD = [
    ("key_cache", lambda t: t.double(), TypeError, f"{DTYPES} [N, P, Hkv, D], got float64 (5, 4, 3, 8)"),
    ("key_cache", lambda t: t[0], ValueError, f"{DTYPES} [N, P, Hkv, D], got float32 (4, 3, 8)"),
    ("key_cache", lambda t: t.transpose(2, 3), ValueError, "of last stride 1, got strides (96, 24, 1, 8)"),
    ("value_cache", lambda t: t[None], ValueError, f"{DTYPES} [N, P, Hkv, Dv], got float32 (1, 5, 4, 3, 8)"),
    ("value_cache", lambda t: t[:4], ValueError, "[5, 4, 3, Dv] like key_cache, got float32 (4, 4, 3, 8)"),
    ("value_cache", lambda t: t[..., :0], ValueError, "of P, Hkv and head size > 0, got float32 (5, 4, 3, 0)"),
    ("block_pairs", lambda t: t.float(), TypeError, "int32 or int64 [n, 2], got float32 (2, 2)"),
    ("block_pairs", lambda t: t[:, :1], ValueError, "[n, 2], got int64 (2, 1)"),
    ("block_pairs", lambda t: t.to("meta"), ValueError, "on cpu like the first, got one on meta"),
    ("block_pairs", lambda t: t + 3, IndexError, "of the cache's 5 blocks, got [[3, 4], [3, 5]]"),
    ("block_pairs", lambda t: torch.tensor([[0, 1], [1, 2]]), ValueError, "of destinations that are written once and never read, got [[0, 1], [1, 2]]"),
    ("block_pairs", lambda t: torch.tensor([[0, 1], [2, 1]]), ValueError, "of destinations that are written once and never read, got [[0, 1], [2, 1]]"),
]
# fmt: on


@pytest.mark.parametrize(("argument", "spoil", "error", "says"), BAD)
def test_bad_input_is_named_before_anything_is_written(argument, spoil, error, says) -> None:
    kwargs = arguments()
    caches = kwargs["key_cache"], kwargs["value_cache"]
    before = [cache.clone() for cache in caches]
    kwargs[argument] = spoil(kwargs[argument])
    with pytest.raises(error) as caught:
        torch_tkv.copy_blocks(**kwargs)
    assert str(caught.value) == f"copy_blocks: {argument} must be {says}"
    assert all(torch.equal(cache, was) for cache, was in zip(caches, before, strict=True))


def test_autograd_is_refused_with_the_way_out() -> None:
    kwargs = arguments()
    kwargs["key_cache"].requires_grad_()
    with pytest.raises(NotImplementedError, match=r"copy_blocks: there is no backward.*no_grad"):
        torch_tkv.copy_blocks(**kwargs)
    with torch.no_grad():
        torch_tkv.copy_blocks(**kwargs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_accepts_every_layout(layout: str) -> None:
    caches = make_caches(layout, 5, 4, 3, 8)
    pairs = torch.tensor([[0, 1, 9], [3, -1, 9]])[:, :2]
    torch.library.opcheck(torch.ops.tkv.copy_blocks, (*caches, pairs))


def test_the_operator_compiles_without_a_graph_break_and_with_dynamic_shapes() -> None:
    compiled = torch.compile(torch_tkv.copy_blocks, fullgraph=True, dynamic=True)
    for pairs in ([[0, 1], [0, 2]], [[3, 4], [2, 0], [-1, -1]]):
        caches = make_caches("NHD", 5, 4, 3, 8)
        expected = [cache.clone() for cache in caches]
        torch_tkv.copy_blocks(*expected, torch.tensor(pairs))
        compiled(*caches, torch.tensor(pairs))
        for cache, copied in zip(caches, expected, strict=True):
            assert torch.equal(cache, copied)


@pytest.mark.gpu
def test_a_captured_copy_replays_with_other_pairs() -> None:
    kv = torch.randn(3, 2, 40, 16, 2, 32, device="cuda").bfloat16()
    pairs = torch.full((12, 2), -1, device="cuda")
    torch_tkv.copy_blocks(*kv.unbind(1), pairs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch_tkv.copy_blocks(*kv.unbind(1), pairs)
    for _ in range(20):
        pairs.copy_(torch.randperm(40)[:24].view(12, 2))
        pairs[torch.randint(12, (3,)), 0] = -1
        expected = kv.cpu()
        torch_tkv.copy_blocks(*expected.unbind(1), pairs.cpu())
        graph.replay()
        assert torch.equal(kv.cpu(), expected)
