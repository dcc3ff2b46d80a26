"""A batch's index tensors say where tokens are, keep their addresses and pad with what is inert."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from steps import DIM, D, Step, Traffic
from torch import Tensor

import torch_tkv
from torch_tkv import BatchIndices, BlockAllocator, PagedBatch, PagedSequence

P = 4


def addresses(batch: PagedBatch) -> list[int]:
    return [index.data_ptr() for index in batch.indices()]


def lists(indices: BatchIndices) -> dict[str, list[int]]:
    return {name: index.tolist() for name, index in indices._asdict().items()}


def test_a_step_is_described_and_the_rest_is_padding() -> None:
    allocator = BlockAllocator(8, P)
    first, second, third = (allocator.allocate() for _ in range(3))
    allocator.append([first, second, third], [3, 8, 2])
    batch = PagedBatch(max_tokens=8, max_sequences=5, max_blocks=3, block_size=P)
    batch.update([second, first, third], [1, 3, 0])
    got = lists(batch.indices())
    table = got.pop("block_table")
    assert got == {
        "positions": [7, 0, 1, 2, 0, 0, 0, 0],
        "slot_mapping": [11, 0, 1, 2, -1, -1, -1, -1],
        "seq_lens": [8, 3, 2, 0, 0],
        "query_start_loc": [0, 1, 4, 4, 4, 4],
    }
    assert table[0][:2] == [1, 2]
    assert table[1][:1] == [0]
    assert table[2][:1] == [3]
    assert (batch.num_tokens, batch.num_sequences) == (4, 3)
    batch.update([first])
    assert batch.indices().positions.tolist() == [2] + [0] * 7
    assert batch.indices().seq_lens.tolist() == [3, 0, 0, 0, 0]
    batch.update([])
    assert batch.indices().slot_mapping.tolist() == [-1] * 8
    assert batch.indices().query_start_loc.tolist() == [0] * 6


def test_random_steps_agree_with_a_token_by_token_reckoning_at_fixed_addresses() -> None:
    rng = random.Random(0)
    batch = PagedBatch(24, 6, 5, P, padding_slot=99)
    at = addresses(batch)
    allocator = BlockAllocator(24, P)
    running = [allocator.allocate() for _ in range(6)]
    for _ in range(200):
        chosen = rng.sample(running, rng.randint(0, 6))
        for sequence in chosen:
            if rng.random() < 0.2 or sequence.num_tokens > 15:
                allocator.truncate(sequence, rng.randint(0, sequence.num_tokens // 2))
        counts = [rng.choice((0, 1, 1, 4)) for _ in chosen]
        allocator.append(chosen, counts)
        batch.update(chosen, counts)
        expected = [
            (position, sequence.blocks[position // P] * P + position % P)
            for sequence, count in zip(chosen, counts, strict=True)
            for position in range(sequence.num_tokens - count, sequence.num_tokens)
        ]
        expected += [(0, 99)] * (24 - len(expected))
        indices = batch.indices()
        got = zip(indices.positions.tolist(), indices.slot_mapping.tolist(), strict=True)
        assert list(got) == expected
        table = indices.block_table.tolist()
        for row, sequence in zip(table, chosen, strict=False):
            assert row[: len(sequence.blocks)] == list(sequence.blocks)
    assert addresses(batch) == at


def test_views_of_a_size_are_made_once_and_follow_the_updates() -> None:
    batch = PagedBatch(8, 4, 3, P)
    indices = batch.indices(2, 3)
    assert all(a is b for a, b in zip(indices, batch.indices(2, 3), strict=True))
    assert [tuple(index.shape) for index in indices] == [(2,), (2,), (3, 3), (3,), (4,)]
    allocator = BlockAllocator(4, P)
    sequence = allocator.allocate()
    allocator.append([sequence], [2])
    batch.update([sequence], [2])
    assert indices.positions.tolist() == [0, 1]
    assert indices.seq_lens.tolist() == [2, 0, 0]


def test_every_tensor_is_aligned_to_16_bytes_as_inductor_asks() -> None:
    first, *others = addresses(PagedBatch(7, 3, 5, P))
    assert [at % 16 for at in others] == [first % 16] * 4


# fmt: off
BAD: list[tuple[Callable[[PagedBatch, list[PagedSequence]], object], str]] = [
    (lambda b, s: PagedBatch(0, 1, 1, 1), "PagedBatch: max_tokens must be at least 1, got 0"),
    (lambda b, s: PagedBatch(1, 0, 1, 1), "PagedBatch: max_sequences must be at least 1, got 0"),
    (lambda b, s: PagedBatch(1, 1, 0, 1), "PagedBatch: max_blocks must be at least 1, got 0"),
    (lambda b, s: PagedBatch(1, 1, 1, 0), "PagedBatch: block_size must be at least 1, got 0"),
    (lambda b, s: b.indices(7), "indices: num_tokens must be from 0 to 6, got 7"),
    (lambda b, s: b.indices(1, -1), "indices: num_sequences must be from 0 to 2, got -1"),
    (lambda b, s: b.update(s), "update: sequences must be at most 2, got 3"),
    (lambda b, s: b.update(s[:2], [1]), "update: counts must be one for each of 2 sequences, got 1"),
    (lambda b, s: b.update(s[:2], [1, 3]), "update: counts must be from 0 to the tokens of each sequence, got [1, 3]"),
    (lambda b, s: b.update(s[:2], [1, -1]), "update: counts must be from 0 to the tokens of each sequence, got [1, -1]"),
    (lambda b, s: b.update(s[:2], [5, 2]), "update: counts must be at most 6 in all, got 7"),
    (lambda b, s: b.update(s[2:], [1]), "update: sequences must be of at most 8 tokens, got 9"),
]
# fmt: on


@pytest.mark.parametrize(("call", "says"), BAD)
def test_bad_input_is_named_and_changes_nothing(call, says) -> None:
    allocator = BlockAllocator(8, P)
    sequences = [allocator.allocate() for _ in range(3)]
    allocator.append(sequences, [5, 2, 9])
    batch = PagedBatch(6, 2, 2, P)
    batch.update(sequences[:2], [3, 1])
    before = lists(batch.indices())
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole text is compared
        call(batch, sequences)
    assert str(caught.value) == says
    assert lists(batch.indices()) == before
    assert (batch.num_tokens, batch.num_sequences) == (4, 2)


def test_its_repr_says_what_it_holds() -> None:
    assert repr(PagedBatch(6, 2, 2, P)) == (
        "PagedBatch(max_tokens=6, max_sequences=2, max_blocks=2, block_size=4, device=cpu): "
        "0 tokens of 0 sequences, 112 bytes"
    )


def at_once(step: Step, x: Tensor) -> Tensor:
    """Return what `step` gives for a whole sequence x [L, DIM], computed without a cache."""
    for layer in step.layers:
        projections = (layer.query, layer.key, layer.value)
        query, key, value = (project(x).unflatten(1, (-1, D)) for project in projections)
        query, key = torch_tkv.rotary_embedding(query, key, step.cos[: len(x)], step.sin[: len(x)])
        heads_first = (rows.transpose(0, 1) for rows in (query, key, value))
        out = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        x = F.normalize(x + layer.out(out.transpose(0, 1).flatten(1)))
    return x


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_a_served_model_gives_what_whole_sequences_give_at_once(layout: str) -> None:
    """Prompts in one batch with decodes, forks, sequences that end and blocks used again."""
    step = Step(30, layout=layout)
    batch = PagedBatch(32, 6, 6, step.cache.block_size)
    traffic = Traffic(batch, 30, longest=20)
    seen: dict[PagedSequence, Tensor] = {}
    copied = 0
    for _ in range(40):
        pairs = traffic.advance()
        step.cache.copy_blocks(pairs)
        copied += len(pairs)
        x = torch.randn(32, DIM)
        got = step(x, batch.indices())
        starts = batch.indices().query_start_loc.tolist()
        for sequence, *rows in zip(traffic.running, starts, starts[1:], strict=False):
            new = x[slice(*rows)]
            known = seen.get(sequence, seen.get(traffic.origins.get(sequence), new))
            seen[sequence] = torch.cat((known[: sequence.num_tokens - len(new)], new))
            whole = at_once(step, seen[sequence])
            torch.testing.assert_close(got[slice(*rows)], whole[-len(new) :])
    assert len(seen) > 20
    assert copied > 3


def test_a_step_of_256_sequences_is_described_in_less_than_a_millisecond() -> None:
    """0.12 ms on a quiet machine; the bound is loose because test machines are not."""
    allocator = BlockAllocator(2**16, 16)
    sequences = [allocator.allocate() for _ in range(256)]
    allocator.append(sequences, range(1, 257))
    batch = PagedBatch(256, 256, 64, 16)
    times = []
    for _ in range(64):
        allocator.append(sequences, [1] * 256)
        begin = time.perf_counter()
        batch.update(sequences)
        times.append(time.perf_counter() - begin)
    assert statistics.median(times) < 1e-3
