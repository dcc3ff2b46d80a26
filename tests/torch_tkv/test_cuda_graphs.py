"""Every way to make CUDA graphs of a step replays as sequences come, grow and go."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from steps import DIM, LAYERS, P, Step, Traffic
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import config
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from torch_tkv import BatchIndices, BlockAllocator, GraphLadder, PagedBatch

STEPS, BLOCKS, MAX_BLOCKS = 200, 600, 64


def test_the_smallest_size_that_fits_is_chosen() -> None:
    sizes: list[int] = []
    ladder = GraphLadder(sizes.append, [4, 1, 2, 16, 4], device="cpu")
    assert ladder.sizes == [1, 2, 4, 16]
    assert not sizes
    for size in (0, 1, 2, 3, 4, 5, 16):
        ladder(size)
    assert sizes == [1, 1, 2, 4, 4, 16, 16]
    with pytest.raises(ValueError, match=r"^GraphLadder: size must be from 0 to the largest, 16"):
        ladder(17)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"sizes": []}, "sizes must be some, each at least 1, got []"),
        ({"sizes": [2, 0]}, "sizes must be some, each at least 1, got [0, 2]"),
        ({"sizes": [2], "warmup": 0}, "warmup must be at least 1, got 0"),
    ],
)
def test_bad_sizes_are_named(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole text is compared
        GraphLadder(lambda size: None, device="cpu", **arguments)
    assert str(caught.value) == f"GraphLadder: {says}"


class Twins:
    """An eager step and one that is run in another way, on the same batches."""

    def __init__(
        self,
        tokens: int,
        *,
        device: str = "cuda",
        blocks: int = BLOCKS,
        context: int = 900,
        **options: Any,
    ) -> None:
        self.eager = Step(blocks, **options).to(device)
        self.step = copy.deepcopy(self.eager)
        # The last block takes the padding of eager writes, which have no slot to skip.
        self.batch = PagedBatch(
            *(tokens, 8, MAX_BLOCKS, P), padding_slot=blocks * P - 1, device=device
        )
        self.x = torch.randn(tokens, DIM, device=device)
        self.traffic = Traffic(
            self.batch, blocks - 1, longest=1 if tokens == 8 else 30, context=context
        )

    def compare(self, run: Callable[[Tensor, BatchIndices], Tensor], steps: int = STEPS) -> None:
        """Run both for a number of steps; require the same outputs and caches after each."""
        for _ in range(steps):
            pairs = self.traffic.advance()
            for twin in (self.eager, self.step):
                twin.cache.copy_blocks(pairs)
            self.x.normal_()
            indices = self.batch.indices()
            got, expected = run(self.x, indices), self.eager(self.x, indices)
            torch.testing.assert_close(got, expected[: len(got)], rtol=1e-4, atol=1e-5)
            caches = zip(self.step.cache.buffers(), self.eager.cache.buffers(), strict=True)
            for cache, as_eager in caches:
                torch.testing.assert_close(cache[:-1], as_eager[:-1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_ladder_serves_each_step_at_the_size_that_fits() -> None:
    twins = Twins(8, device="cpu", blocks=100, context=60)
    sizes: Counter[int] = Counter()

    def step(size: int) -> Tensor:
        sizes[size] += 1
        return twins.step(twins.x[:size], twins.batch.indices(size, size))

    ladder = GraphLadder(step, [1, 2, 4, 8], device="cpu")
    twins.compare(lambda x, indices: ladder(twins.batch.num_sequences), steps=25)
    assert sum(sizes.values()) == 25
    assert len(sizes) > 2


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count the captures and the replays of CUDA graphs, whoever makes them."""
    counts: Counter[str] = Counter()

    def counted(method: str) -> Callable[..., Any]:
        original = getattr(torch.cuda.CUDAGraph, method)

        def count(*args: Any, **kwargs: Any) -> Any:
            counts[method] += 1
            return original(*args, **kwargs)

        return count

    for method in ("capture_begin", "replay"):
        monkeypatch.setattr(torch.cuda.CUDAGraph, method, counted(method))
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad(), config.patch({"triton.cudagraph_or_error": True}):
        yield counts


@pytest.fixture(params=[False, True], ids=["whole", "partitioned"])
def _graph_partition(request: pytest.FixtureRequest) -> Iterator[None]:
    with config.patch(graph_partition=request.param):
        yield


def check_manual_graph(
    twins: Twins, run: Callable[[Tensor, BatchIndices], Tensor], graphs: Counter[str]
) -> None:
    """Capture `run` by hand and hold its replays against the eager step."""
    indices = twins.batch.indices()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(twins.x, indices)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(twins.x, indices)

    def replay(x: Tensor, indices: BatchIndices) -> Tensor:
        graph.replay()
        return out

    twins.compare(replay)
    assert graphs == {"capture_begin": 1, "replay": STEPS}


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("tokens", [8, 48])
def test_a_manual_graph_replays(graphs: Counter[str], tokens: int, layout: str) -> None:
    twins = Twins(tokens, layout=layout)
    check_manual_graph(twins, twins.step, graphs)


@pytest.mark.gpu
def test_a_manual_graph_of_a_compiled_step_replays(graphs: Counter[str]) -> None:
    twins = Twins(48, eager_writes=True)
    check_manual_graph(twins, torch.compile(twins.step, backend="tkv", fullgraph=True), graphs)


@pytest.mark.gpu
def test_a_graphed_callable_replays(graphs: Counter[str]) -> None:
    twins = Twins(48)
    step = torch.cuda.make_graphed_callables(twins.step, (twins.x, twins.batch.indices()))
    assert graphs == {"capture_begin": 1}
    twins.compare(step)
    assert graphs == {"capture_begin": 1, "replay": STEPS}


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_ladder_replays_one_graph_a_step(graphs: Counter[str], compiled: bool) -> None:
    twins = Twins(8)
    step = torch.compile(twins.step, backend="tkv", fullgraph=True) if compiled else twins.step
    ladder = GraphLadder(
        lambda size: step(twins.x[:size], twins.batch.indices(size, size)), [1, 2, 4, 8]
    )
    assert graphs == {"capture_begin": 4}
    twins.compare(lambda x, indices: ladder(twins.batch.num_sequences))
    assert graphs == {"capture_begin": 4, "replay": STEPS}


def kernels(function: Callable[..., object], *args: object) -> list[str]:
    """Return the names of what ran on the GPU."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        function(*args)
        torch.cuda.synchronize()
    names = [event.name for event in profiled.events() if event.device_type == DeviceType.CUDA]
    return [name for name in names if "Compiled" not in name]  # annotations of regions


@pytest.mark.gpu
@pytest.mark.usefixtures("_graph_partition")
@pytest.mark.parametrize(
    ("backend", "eager_writes"), [("inductor", False), ("tkv", False), ("tkv", True)]
)
def test_reduce_overhead_replays_one_graph_a_step_and_copies_no_cache(
    graphs: Counter[str], backend: str, eager_writes: bool
) -> None:
    twins = Twins(48, eager_writes=eager_writes)
    step = torch.compile(twins.step, backend=backend, mode="reduce-overhead", fullgraph=True)
    twins.compare(step, steps=5)  # compiles and warms up, then records
    graphs.clear()
    twins.compare(step)
    assert graphs == {"replay": STEPS}
    assert counters["inductor"]["cudagraph_skips"] == 0
    # x alone is copied into the graph: caches, indices and weights are where they were.
    assert counters["inductor"]["cudagraph_recorded_non_static_inputs"] == 1

    args = (twins.x, twins.batch.indices())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(10):
        step(*args)
    cache = next(twins.step.cache.buffers())
    assert torch.cuda.max_memory_allocated() - before < cache.nbytes / 2
    replayed = kernels(step, *args)
    # Rotation alone is a launch of the kernel that also writes.
    write = "_reshape_and_cache" if eager_writes else "_rope_reshape_and_cache"
    assert replayed.count(write) == LAYERS
    assert len(replayed) < len(kernels(twins.eager, *args))


@pytest.mark.gpu
@config.patch(graph_partition=True, custom_should_partition_ops=["tkv::paged_attention"])
def test_a_step_that_is_partitioned_at_attention_replays_the_pieces(graphs: Counter[str]) -> None:
    twins = Twins(48)
    step = torch.compile(twins.step, backend="tkv", mode="reduce-overhead", fullgraph=True)
    twins.compare(step, steps=5)
    graphs.clear()
    twins.compare(step)
    assert graphs == {"replay": STEPS * (LAYERS + 1)}
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.gpu
def test_updates_of_a_batch_neither_wait_for_the_gpu_nor_overtake_each_other() -> None:
    allocator = BlockAllocator(64, P)
    sequences = [allocator.allocate() for _ in range(4)]
    batch, on_cpu = (PagedBatch(4, 4, 16, P, device=device) for device in ("cuda", "cpu"))
    got: list[list[Tensor]] = []
    expected: list[list[Tensor]] = []

    def update() -> None:
        allocator.append(sequences, [1] * 4)
        for target, seen in ((batch, got), (on_cpu, expected)):
            target.update(sequences)
            seen.append([index.clone() for index in target.indices()])

    for _ in range(8):
        update()
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)
    for _ in range(2):
        update()
    assert not torch.cuda.current_stream().query()  # the GPU still sleeps
    for _ in range(20):
        update()
    for on_gpu, right in zip(got, expected, strict=True):
        for index, as_on_cpu in zip(on_gpu, right, strict=True):
            assert torch.equal(index.cpu(), as_on_cpu)
