"""A decode step of a Llama-3.1-8B shape on one GPU, and on several that share its heads.

`torchrun --nproc-per-node 2 benchmarks/tensor_parallel.py --csv tensor_parallel.csv`

The first process measures alone, then all of them together: the same weights and caches, split by
heads and columns, with one all-reduce after attention and one after the feed-forward network. The
step is compiled with backend="tkv" and replayed as a CUDA graph that holds the collectives. Its
result is compared with that of one GPU first.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
from collections.abc import Callable
from typing import NamedTuple

import harness
import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import HKV, HQ, D, P
from tabulate import tabulate
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import torch_tkv
from torch_tkv import (
    BatchIndices,
    BlockAllocator,
    GraphLadder,
    LayerCache,
    PagedBatch,
    PagedKVCache,
)

DIM, FFN = HQ * D, 14336
GRID = ("1x1024", "1x16384", "16x4096", "64x2048")
TOLERANCE = 0.02  # of the result's norm: sums are split and rounded otherwise


class Row(NamedTuple):
    """A measurement, as in the CSV file."""

    gpus: int
    batch: int
    context: int
    layers: int
    ms: float
    tokens_per_s: float
    speedup: float  # over one GPU
    gpu: str
    torch: str
    triton: str
    commit: str
    date: str


class Layer(nn.Module):
    """A layer of Llama; its linear maps may be split over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.query, self.out = linear(DIM, HQ * D), linear(HQ * D, DIM)
        self.key, self.value = linear(DIM, HKV * D), linear(DIM, HKV * D)
        self.gate, self.up, self.down = linear(DIM, FFN), linear(DIM, FFN), linear(FFN, DIM)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache, batch: BatchIndices
    ) -> Tensor:
        normed = self.attention_norm(x)
        projected = (project(normed) for project in (self.query, self.key, self.value))
        query, key, value = (heads.unflatten(1, (-1, D)) for heads in projected)
        caches = cache.key_cache, cache.value_cache
        query = torch_tkv.rope_reshape_and_cache(
            *(query, key, value, cos, sin, batch.positions, *caches, batch.slot_mapping)
        )
        indices = batch.block_table, batch.seq_lens, batch.query_start_loc
        x = x + self.out(torch_tkv.paged_attention(query, *caches, *indices).flatten(1))
        normed = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Model(nn.Module):
    """Layers over a paged cache of this rank's heads."""

    def __init__(self, layers: int, num_blocks: int, ranks: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.cache = PagedKVCache(layers, HKV // ranks, D, block_size=P, num_blocks=num_blocks)
        exponents = torch.linspace(0, 1, D // 2, dtype=torch.float32)
        positions = torch.arange(2**15, dtype=torch.float32)
        angles = torch.outer(positions, 500000.0**-exponents)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x: Tensor, batch: BatchIndices) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x, self.cos, self.sin, self.cache.layer(i), batch)
        return x


def linear(inputs: int, outputs: int) -> nn.Linear:
    """Return a linear map that keeps the size of what it is given, about."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=inputs**-0.5)
    return layer


def make_model(layers: int, num_blocks: int, mesh: DeviceMesh | None) -> Model:
    """Return the model on this rank's GPU, its weights and caches the same for any mesh."""
    ranks, rank = (1, 0) if mesh is None else (mesh.size(), mesh.get_local_rank())
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Model(layers, num_blocks, ranks).requires_grad_(False)
        for buffer in model.cache.buffers():
            whole = torch.randn(num_blocks, P, HKV, D)
            buffer.copy_(whole.chunk(ranks, dim=2)[rank])
    torch.set_default_dtype(torch.float32)
    if mesh is not None:
        names = ("query", "key", "value", "gate", "up")
        plan = {f"layers.*.{name}": ColwiseParallel() for name in names}
        plan |= {f"layers.*.{name}": RowwiseParallel() for name in ("out", "down")}
        parallelize_module(model, mesh, plan)
    return model


def measure(
    batch_size: int, context: int, layers: int, repeats: int, mesh: DeviceMesh | None
) -> tuple[float, Tensor]:
    """Return the median time of a decode step, in ms, and the step's result."""
    max_blocks = -(-(context + 1) // P)
    num_blocks = batch_size * max_blocks
    model = make_model(layers, num_blocks, mesh)
    allocator = BlockAllocator(num_blocks, P)
    batch = PagedBatch(batch_size, batch_size, max_blocks, P, device="cuda")
    torch.manual_seed(1)
    x = torch.randn(batch_size, DIM, device="cuda").bfloat16()
    compiled = torch.compile(model, backend="tkv", fullgraph=True)
    decode = GraphLadder(lambda size: compiled(x, batch.indices()), [batch_size])
    sequences = [allocator.allocate() for _ in range(batch_size)]
    allocator.append(sequences, [context] * batch_size)
    batch.update(sequences)
    result = decode(batch_size).clone()
    return replay(lambda: decode(batch_size), repeats), result


def replay(step: Callable[[], object], repeats: int) -> float:
    """Return the median time of `step`, in ms, after a few to begin with."""
    times = []
    for _ in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[3:])


def parse_args() -> argparse.Namespace:
    parser = harness.host_parser(__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rows", nargs="+", default=GRID, metavar="BATCHxCONTEXT")
    return parser.parse_args()


def main() -> None:
    """Measure on one GPU and on all, compare, print and write."""
    options = parse_args()
    harness.require_gpu()
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" not in os.environ:
        sys.exit("Run it under torchrun: torchrun --nproc-per-node 2 benchmarks/tensor_parallel.py")
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    first, rows = dist.get_rank() == 0, []
    for size in options.rows:
        batch_size, context = map(int, size.split("x"))
        args = (batch_size, context, options.layers, options.repeats)
        with torch.no_grad():
            alone, expected = measure(*args, None) if first else (0.0, None)
            torch.compiler.reset()
            dist.barrier()
            together, result = measure(*args, mesh)
            torch.compiler.reset()
        if expected is not None:
            error = ((result - expected).float().norm() / expected.float().norm()).item()
            if not error <= TOLERANCE:
                sys.exit(f"{size}: {mesh.size()} GPUs give another result, error {error:.3f}")
            for gpus, ms in ((1, alone), (mesh.size(), together)):
                numbers = (ms, batch_size / ms * 1e3, alone / ms)
                machine = harness.describe_machine()
                rows.append(Row(gpus, batch_size, context, options.layers, *numbers, *machine))
    if first:
        report(rows, options)
    dist.destroy_process_group()


def report(rows: list[Row], options: argparse.Namespace) -> None:
    """Print the table and write the CSV file."""
    print(", ".join(rows[0][7:]))
    print(tabulate([row[:7] for row in rows], Row._fields[:7], floatfmt=".2f"))
    if options.csv:
        with options.csv.open("w", newline="") as file:
            csv.writer(file).writerows([Row._fields, *rows])


if __name__ == "__main__":
    main()
