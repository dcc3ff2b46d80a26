"""A cache allocates what it says, in storages that a compiled model writes in place."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from steps import DIM, Step, Traffic
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext

import torch_tkv
from torch_tkv import PagedBatch, PagedKVCache

E4M3 = torch.float8_e4m3fn


def total_bytes(cache: PagedKVCache) -> int:
    return sum(buffer.untyped_storage().nbytes() for buffer in cache.buffers())


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize(
    ("dtype", "scales"),
    [(torch.bfloat16, None), (E4M3, None), (E4M3, "tensor"), (E4M3, "head"), (torch.int8, "token")],
)
def test_a_budget_buys_as_many_blocks_as_fit_into_it(layout, dtype, scales) -> None:
    def make(**size: int) -> PagedKVCache:
        return PagedKVCache(
            *(3, 2, 16),
            value_size=24,
            block_size=4,
            dtype=dtype,
            scales=scales,
            layout=layout,
            **size,
        )

    one = make(num_blocks=1)
    block = make(num_blocks=2).num_bytes - one.num_bytes
    for memory, blocks in ((one.num_bytes + 5 * block, 6), (one.num_bytes + 5 * block - 1, 5)):
        cache = make(memory=memory)
        assert cache.num_blocks == blocks
        assert cache.num_slots == 4 * blocks
        assert cache.num_bytes == total_bytes(cache) <= memory
    with pytest.raises(ValueError, match=f"memory must be at least {one.num_bytes}, for a block"):
        make(memory=one.num_bytes - 1)


def test_the_tensors_of_a_layer_have_the_shapes_and_strides_that_the_operators_take() -> None:
    layer = PagedKVCache(2, 3, 16, value_size=8, num_blocks=5, block_size=4).layer(1)
    assert layer.key_cache.shape == (5, 4, 3, 16)
    assert layer.value_cache.shape == (5, 4, 3, 8)
    assert layer.key_cache.is_contiguous()
    assert layer[2:] == (None,) * 4
    layer = PagedKVCache(
        2, 3, 16, num_blocks=5, block_size=4, dtype=torch.int8, scales="token", layout="HND"
    ).layer(0)
    assert layer.key_cache.shape == (5, 4, 3, 16)
    assert layer.key_cache.transpose(1, 2).is_contiguous()
    assert layer.k_scale_cache.shape == layer.v_scale_cache.shape == (5, 4, 3)
    assert layer.v_scale_cache.transpose(1, 2).is_contiguous()
    for scales, shape in (("tensor", ()), ("head", (3,))):
        layer = PagedKVCache(1, 3, 16, num_blocks=5, dtype=E4M3, scales=scales).layer(0)
        assert torch.equal(layer.k_scale, torch.ones(shape))
        assert torch.equal(layer.v_scale, torch.ones(shape))


def test_keys_and_values_of_every_layer_have_storages_of_their_own() -> None:
    cache = PagedKVCache(3, 2, 8, num_blocks=4, dtype=torch.int8, scales="token")
    buffers = list(cache.buffers())
    assert len({buffer.untyped_storage().data_ptr() for buffer in buffers}) == len(buffers) == 12
    assert all(buffer.storage_offset() == 0 for buffer in buffers)


@pytest.mark.parametrize(
    ("dtype", "scales", "error"),
    [(torch.float32, None, 0.0), (E4M3, "head", 1 / 16), (torch.int8, "token", 1 / 254)],
)
def test_each_kind_of_cache_keeps_what_the_operators_write(dtype, scales, error) -> None:
    cache = PagedKVCache(2, 2, 16, num_blocks=3, block_size=4, dtype=dtype, scales=scales)
    layer = cache.layer(1)
    key, value = torch.randn(2, 5, 2, 16)
    slots = torch.tensor([0, 1, 2, 3, 9])
    if scales == "token":
        torch_tkv.reshape_and_cache_dynamic(
            key, value, *layer[:2], layer.k_scale_cache, layer.v_scale_cache, slots
        )
        scale = layer.v_scale_cache.flatten(0, 1)[slots, :, None]
    else:
        torch_tkv.reshape_and_cache(key, value, *layer[:2], slots, layer.k_scale, layer.v_scale)
        scale = torch.ones(())
    got = layer.value_cache.float().flatten(0, 1)[slots] * scale
    assert (got - value).abs().max() <= error * value.abs().max()
    assert not cache.layer(0).value_cache.float().any()


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_blocks_are_copied_in_every_layer_with_their_scales(layout: str) -> None:
    cache = PagedKVCache(
        2, 2, 8, num_blocks=6, block_size=4, dtype=torch.int8, scales="token", layout=layout
    )
    for buffer in cache.buffers():
        buffer.copy_(torch.randint(-99, 99, buffer.shape))
    before = {name: buffer.clone() for name, buffer in cache.named_buffers()}
    cache.copy_blocks([])
    cache.copy_blocks([(0, 3), (0, 1), (5, 4)])
    for name, buffer in cache.named_buffers():
        assert torch.equal(buffer, before[name][[0, 0, 2, 0, 5, 5]])


def test_it_is_no_part_of_a_state_dict_and_keeps_its_dtypes() -> None:
    model = torch.nn.Module()
    model.cache = PagedKVCache(1, 2, 8, num_blocks=4, dtype=E4M3, scales="head")
    model.linear = torch.nn.Linear(2, 2)
    assert list(model.state_dict()) == ["linear.weight", "linear.bias"]
    model.half()
    assert model.linear.weight.dtype == torch.float16
    assert model.cache.layer(0).key_cache.dtype == E4M3
    assert model.cache.layer(0).k_scale.dtype == torch.float32
    assert model.to("meta").cache.layer(0).k_scale.is_meta


def test_a_cache_that_was_made_without_memory_is_allocated_later() -> None:
    cache = PagedKVCache(1, 2, 8, num_blocks=4, layout="HND", device="meta").to_empty(device="cpu")
    assert cache.layer(0).key_cache.transpose(1, 2).is_contiguous()
    assert cache.layer(0).key_cache.is_cpu


def test_its_repr_says_what_it_allocated() -> None:
    assert repr(PagedKVCache(2, 8, 128, num_blocks=64, device="meta")) == (
        "PagedKVCache(num_layers=2, num_kv_heads=8, head_size=128, block_size=16, num_blocks=64, "
        "dtype=torch.bfloat16, layout='NHD': 1,024 tokens, 8,388,608 bytes)"
    )
    cache = PagedKVCache(
        1, 2, 8, value_size=4, num_blocks=3, dtype=torch.int8, scales="token", layout="HND"
    )
    assert repr(cache) == (
        "PagedKVCache(num_layers=1, num_kv_heads=2, head_size=8, value_size=4, block_size=16, "
        "num_blocks=3, dtype=torch.int8, scales='token', layout='HND': 48 tokens, 1,920 bytes)"
    )


# fmt: off
BAD = [
    ({"num_layers": 0}, ValueError, "num_layers must be at least 1, got 0"),
    ({"num_kv_heads": 0}, ValueError, "num_kv_heads must be at least 1, got 0"),
    ({"head_size": 0}, ValueError, "head_size must be at least 1, got 0"),
    ({"value_size": 0}, ValueError, "value_size must be at least 1, got 0"),
    ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
    ({"num_blocks": 0}, ValueError, "num_blocks must be at least 1, got 0"),
    ({"num_blocks": None}, ValueError, "num_blocks must be given, or else memory, got None and None"),
    ({"memory": 10**9}, ValueError, "num_blocks must be given, or else memory, got 4 and 1000000000"),
    ({"layout": "NDH"}, ValueError, "layout must be \"NHD\" or \"HND\", got 'NDH'"),
    ({"dtype": torch.float64}, TypeError, "dtype must be float32, float16, bfloat16, float8_e4m3fn, float8_e5m2 or int8, got torch.float64"),
    ({"dtype": torch.int8}, ValueError, "scales must be \"token\" for int8, got None"),
    ({"dtype": E4M3, "scales": "row"}, ValueError, "scales must be None, \"tensor\", \"head\" or \"token\", got 'row'"),
    ({"scales": "head"}, ValueError, "scales must be None for torch.bfloat16, got 'head'"),
]
# fmt: on


@pytest.mark.parametrize(("change", "error", "says"), BAD)
def test_bad_input_is_named(change, error, says) -> None:
    sizes = {"num_layers": 1, "num_kv_heads": 2, "head_size": 8, "num_blocks": 4}
    with pytest.raises(error) as caught:
        PagedKVCache(**(sizes | change))
    assert str(caught.value) == f"PagedKVCache: {says}"


@pytest.mark.parametrize("index", [-1, 2])
def test_a_layer_that_does_not_exist_is_refused(index: int) -> None:
    with pytest.raises(IndexError, match=f"layer: index must be from 0 to 1, got {index}"):
        PagedKVCache(2, 2, 8, num_blocks=4).layer(index)


@torch.no_grad()
def test_a_compiled_model_reaches_its_cache_without_a_graph_break() -> None:
    eager = Step(30)
    step = copy.deepcopy(eager)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    batch = PagedBatch(32, 6, 6, step.cache.block_size)
    traffic = Traffic(batch, 30, longest=20)
    for _ in range(5):
        pairs = traffic.advance()
        for twin in (eager, step):
            twin.cache.copy_blocks(pairs)
        x = torch.randn(32, DIM)
        torch.testing.assert_close(compiled(x, batch.indices()), eager(x, batch.indices()))
        for got, expected in zip(step.cache.buffers(), eager.cache.buffers(), strict=True):
            torch.testing.assert_close(got, expected)
    assert all(buffer.any() for buffer in eager.cache.buffers())


class Writer(torch.nn.Module):
    def __init__(self, cache: PagedKVCache) -> None:
        super().__init__()
        self.cache = cache

    def forward(self, rows: Tensor, slots: Tensor) -> None:
        write(self.cache, rows, slots)


def write(cache: PagedKVCache, rows: Tensor, slots: Tensor) -> None:
    torch_tkv.reshape_and_cache(rows, rows, *cache.layer(0)[:2], slots)


@pytest.mark.parametrize("reach", ["argument", "closure", "module"])
@torch.no_grad()
def test_a_compiled_function_takes_the_addresses_of_a_cache_as_fixed(reach: str) -> None:
    """What Inductor asks of tensors that a function with CUDA graphs mutates."""
    cache = PagedKVCache(1, 2, 8, num_blocks=4, dtype=torch.float32)
    args = (torch.randn(3, 2, 8), torch.arange(3))
    functions: dict[str, Callable[..., None]] = {
        "argument": lambda rows, slots, cache: write(cache, rows, slots),
        "closure": lambda rows, slots: write(cache, rows, slots),
        "module": Writer(cache),
    }
    fixed: list[int] = []

    def compile_graph(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        addresses = [x.data_ptr() for x in (cache.key_cache_0, cache.value_cache_0)]
        indices = TracingContext.get().fw_metadata.static_input_indices

        def run(*inputs: Tensor) -> object:
            fixed.extend(addresses.index(inputs[i].data_ptr()) for i in indices)
            return gm(*inputs)

        return run

    backend = aot_autograd(fw_compiler=compile_graph)
    extra = (cache,) if reach == "argument" else ()
    torch.compile(functions[reach], backend=backend, fullgraph=True)(*args, *extra)
    assert sorted(fixed) == [0, 1]
    assert torch.equal(cache.key_cache_0.flatten(0, 1)[:3], args[0])
