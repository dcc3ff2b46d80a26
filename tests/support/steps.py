"""A small model over a paged cache, and sequences that come, grow and go: what a server does."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_tkv
from torch_tkv import (
    BatchIndices,
    BlockAllocator,
    LayerCache,
    OutOfBlocks,
    PagedBatch,
    PagedKVCache,
    PagedSequence,
)

LAYERS, HQ, HKV, D, P = 2, 4, 2, 16, 16
DIM = HQ * D


class Attention(nn.Module):
    """RoPE, cache write and attention between projections; heads may be split over ranks."""

    def __init__(self, eager_writes: bool) -> None:
        super().__init__()
        self.eager_writes = eager_writes
        self.query, self.out = nn.Linear(DIM, HQ * D), nn.Linear(HQ * D, DIM)
        self.key, self.value = nn.Linear(DIM, HKV * D), nn.Linear(DIM, HKV * D)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache, batch: BatchIndices
    ) -> Tensor:
        heads = (project(x).unflatten(1, (-1, D)) for project in (self.query, self.key, self.value))
        query, key, value = heads
        key_cache, value_cache = cache[:2]
        if self.eager_writes:
            angles = (cos, sin, batch.positions)
            query, key = torch_tkv.rotary_embedding(query, key, *angles)
            block, offset = batch.slot_mapping // P, batch.slot_mapping % P
            key_cache[block, offset] = key
            value_cache[block, offset] = value
        else:
            query = torch_tkv.rope_reshape_and_cache(
                *(query, key, value, cos, sin, batch.positions),
                *(key_cache, value_cache, batch.slot_mapping),
            )
        out = torch_tkv.paged_attention(
            query, key_cache, value_cache, batch.block_table, batch.seq_lens, batch.query_start_loc
        )
        return self.out(out.flatten(1))


class Step(nn.Module):
    """Two layers of attention: x [T, DIM] to [T, DIM]."""

    def __init__(
        self,
        num_blocks: int,
        *,
        num_kv_heads: int = HKV,
        layout: str = "NHD",
        eager_writes: bool = False,
    ) -> None:
        super().__init__()
        self.cache = PagedKVCache(
            *(LAYERS, num_kv_heads, D),
            num_blocks=num_blocks,
            block_size=P,
            dtype=torch.float32,
            layout=layout,
        )
        self.layers = nn.ModuleList(Attention(eager_writes) for _ in range(LAYERS))
        angles = torch.outer(torch.arange(4096.0), 10000 ** -torch.linspace(0, 1, D // 2))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.requires_grad_(False)

    def forward(self, x: Tensor, batch: BatchIndices) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = F.normalize(x + layer(x, self.cos, self.sin, self.cache.layer(i), batch))
        return x


class Traffic:
    """Random sequences that begin, grow over block boundaries, fork and end.

    Args:
        batch: is updated for each step.
        num_blocks: of the cache.
        longest: most tokens of a prompt; 1 makes every step a decode step.
        context: most tokens that a new sequence has before, whatever their slots hold.

    Attributes:
        running: the sequences of the step.
        origins: of which sequence a forked one is a copy.
    """

    def __init__(
        self, batch: PagedBatch, num_blocks: int, *, longest: int = 1, context: int = 0
    ) -> None:
        self.batch, self.longest, self.context = batch, longest, context
        self.allocator = BlockAllocator(num_blocks, batch.block_size)
        self.running: list[PagedSequence] = []
        self.origins: dict[PagedSequence, PagedSequence] = {}
        self.random = random.Random(0)

    def advance(self) -> list[tuple[int, int]]:
        """Plan a step, a token for each sequence and prompts of new ones; return what to copy."""
        rng, batch = self.random, self.batch
        room = batch.max_blocks * batch.block_size
        for sequence in list(self.running):
            if sequence.num_tokens + self.longest > room or rng.random() < 0.1:
                self._end(sequence)
        counts = [1] * len(self.running)
        while len(self.running) < batch.max_sequences and rng.random() < 0.5:
            count = rng.randint(1, self.longest)
            if sum(counts) + count > batch.max_tokens:
                break
            self._begin(rng.choice(self.running) if counts and rng.random() < 0.3 else None)
            counts.append(count)
        while True:
            try:
                pairs = self.allocator.append(self.running, counts)
            except OutOfBlocks:
                self._end(self.running[0])
                del counts[0]
            else:
                batch.update(self.running, counts)
                return pairs

    def _begin(self, origin: PagedSequence | None) -> None:
        if origin is None:
            self.running.append(self.allocator.allocate())
            self.allocator.append(self.running[-1:], [self.random.randint(0, self.context)])
        else:
            self.running.append(self.allocator.fork(origin))
            self.origins[self.running[-1]] = origin

    def _end(self, sequence: PagedSequence) -> None:
        self.running.remove(sequence)
        self.allocator.free(sequence)
