"""The operators on a GPU: against the CPU reference, inside CUDA graphs, under debug asserts."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys

import pytest
import torch
from operators import WRITES, make_arguments, mutated, with_own_caches
from paged import make_batch, make_caches, storage
from torch._inductor import config

import torch_tkv

pytestmark = pytest.mark.gpu


def test_the_operators_give_on_a_gpu_what_they_give_on_a_cpu() -> None:
    caches = make_caches("NHD", 9, 16, 2, 32)
    on_gpu = [cache.cuda() for cache in caches]
    key, value = torch.randn(2, 21, 2, 32)
    slots = torch.randperm(9 * 16)[:20]
    slots[3] = -1
    torch_tkv.reshape_and_cache(key, value, *caches, slots)
    torch_tkv.reshape_and_cache(key.cuda(), value.cuda(), *on_gpu, slots.cuda())
    assert torch.equal(caches[0], on_gpu[0].cpu())
    assert torch.equal(caches[1], on_gpu[1].cpu())
    batch = make_batch([5, 33, 20], [1, 4, 20], heads=(8, 2), head_size=32, padding=1)
    on_cpu, on_gpu = (torch_tkv.paged_attention(*b) for b in (batch, batch.to("cuda")))
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-5, atol=1e-5)


def test_tensors_on_two_devices_are_refused() -> None:
    batch = make_batch([5], [1]).to("cuda")
    with pytest.raises(ValueError, match="seq_lens must be on cuda:0 like the first, got one on c"):
        torch_tkv.paged_attention(*batch._replace(seq_lens=batch.seq_lens.cpu()))


def captured(function, *args):
    """Warm up, capture and return the graph and what it returns."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function(*args)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(*args)
    return graph, out


@pytest.mark.parametrize("stem", [*WRITES, "rotary_embedding"])
def test_a_captured_call_replays_with_other_contents(stem: str) -> None:
    tokens = 90
    kwargs = make_arguments(stem, tokens, dtype=torch.bfloat16, device="cuda", block_size=16)
    call = functools.partial(getattr(torch_tkv, stem), **kwargs)
    graph, out = captured(call)
    for repeat in range(20):
        for name, arg in kwargs.items():
            if name == "positions":
                arg.random_(kwargs["cos"].shape[0])
            elif name == "slot_mapping":
                consecutive = torch.arange(tokens) + repeat // 2
                arg.copy_(torch.randperm(tokens) if repeat % 2 else consecutive)
                arg[torch.randint(tokens, (3,))] = -1
            elif isinstance(arg, torch.Tensor) and arg.is_floating_point():
                arg.uniform_(0.1, 1.0)
        expected = with_own_caches(stem, kwargs)
        right = getattr(torch_tkv, stem)(**expected)
        graph.replay()
        torch.testing.assert_close(out, right, rtol=0, atol=0)
        for name in mutated(stem):
            assert torch.equal(storage(kwargs[name]), storage(expected[name]))


def test_captured_attention_replays_with_other_lengths_and_other_blocks() -> None:
    batch = make_batch([70, 70, 70, 70], [3, 3, 3, 3]).to("cuda")
    caches = [torch.randn_like(cache) for cache in batch[1:3]]
    batch = batch._replace(key_cache=caches[0], value_cache=caches[1])
    graph, out = captured(torch_tkv.paged_attention, *batch)
    for _ in range(20):
        batch.query.normal_()
        blocks = torch.randint(caches[0].shape[0], batch.block_table.shape)
        batch.block_table.copy_(blocks)
        batch.seq_lens.copy_(torch.randint(90, (4,)))
        batch.query_start_loc[1:] = torch.randint(4, (4,)).cumsum(0)
        graph.replay()
        assert torch.equal(out, torch_tkv.paged_attention(*batch))


def test_debug_mode_turns_a_slot_outside_the_cache_into_a_device_assert() -> None:
    code = (
        "import torch, torch_tkv; x = torch.randn(1, 1, 16, device='cuda'); "
        "cache = torch.zeros(2, 4, 1, 16, device='cuda'); "
        "torch_tkv.reshape_and_cache(x, x, cache, cache.clone(), torch.tensor([8], device='cuda'));"
        "torch.cuda.synchronize(); print('dropped')"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "dropped\n"
    env = os.environ | {"TKV_DEBUG": "1"}
    debugged = subprocess.run(command, capture_output=True, text=True, env=env)
    assert debugged.returncode != 0
    assert "a slot lies outside the cache" in debugged.stderr


class Writer(torch.nn.Module):
    """Writes to a paged cache as eager PyTorch does, then attends to it."""

    def __init__(self) -> None:
        super().__init__()
        key_cache, value_cache = make_caches("NHD", 4096, 16, 2, 32, device="cuda")
        self.register_buffer("key_cache", key_cache)
        self.register_buffer("value_cache", value_cache)

    def forward(self, query, key, value, slots, block_table, seq_lens, query_start_loc):
        self.key_cache[slots // 16, slots % 16] = key
        self.value_cache[slots // 16, slots % 16] = value
        return torch_tkv.paged_attention(
            query, self.key_cache, self.value_cache, block_table, seq_lens, query_start_loc
        )


@torch.no_grad()
@config.patch({"triton.cudagraph_or_error": True})
def test_a_compiled_step_is_one_cuda_graph_that_writes_in_place() -> None:
    eager = Writer()
    compiled = copy.deepcopy(eager)
    step = torch.compile(compiled, backend="tkv", mode="reduce-overhead", fullgraph=True)
    starts = torch.arange(5, dtype=torch.int32, device="cuda")
    table = torch.randperm(4096, device="cuda").int().view(4, 1024)
    seq_lens = torch.tensor([14, 15, 1000, 3], dtype=torch.int32, device="cuda")
    for number in range(30):
        key, value = torch.randn(2, 4, 2, 32, device="cuda")
        query = torch.randn(4, 4, 32, device="cuda")
        seq_lens.add_(1)  # crosses the blocks' boundaries
        block = table.gather(1, (seq_lens - 1).long()[:, None] // 16)[:, 0]
        args = (query, key, value, block.long() * 16 + (seq_lens - 1) % 16, table, seq_lens, starts)
        if number == 5:  # warmed up and recorded
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        torch.testing.assert_close(step(*args), eager(*args))
        assert torch.equal(compiled.key_cache, eager.key_cache)
        assert torch.equal(compiled.value_cache, eager.value_cache)
    grown = torch.cuda.max_memory_allocated() - before
    assert grown < compiled.key_cache.nbytes / 2  # no copy of a cache
