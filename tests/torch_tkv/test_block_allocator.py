"""Sequences find in their blocks what they wrote, whoever shares, copies or evicts them."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from torch_tkv import BlockAllocator, OutOfBlocks, PagedSequence

N, P = 14, 4
# Mostly whole blocks, of two kinds, so that prefixes meet.
pieces = st.lists(st.sampled_from([[0] * P, [1] * P, [0], [1]]), max_size=3)
few_tokens = pieces.map(lambda lists: [token for piece in lists for token in piece])


class Server(RuleBasedStateMachine):
    """Writes tokens where the allocator says, and reads them back after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(N, P)
        # Keys and values depend on all tokens up to theirs, so these stand for them.
        self.memory: list[tuple[int, ...]] = [()] * (N * P)
        self.contents: dict[PagedSequence, list[int]] = {}
        self.texts: list[list[int]] = [[]]  # once recorded

    def slots(self, sequence: PagedSequence) -> list[int]:
        return [sequence.blocks[i // P] * P + i % P for i in range(sequence.num_tokens)]

    def pick(self, data: st.DataObject) -> PagedSequence:
        return data.draw(st.sampled_from(list(self.contents)))

    @precondition(lambda self: len(self.contents) < 5)
    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        prompt = data.draw(st.sampled_from(self.texts)) + data.draw(few_tokens)
        sequence = self.allocator.allocate(prompt)
        assert sequence.num_tokens % P == 0
        assert sequence.num_tokens < max(len(prompt), 1)
        self.contents[sequence] = prompt[: sequence.num_tokens]
        self.write({sequence: prompt[sequence.num_tokens :]})
        self.record(sequence)

    def record(self, sequence: PagedSequence) -> None:
        tokens = self.contents[sequence]
        self.allocator.record(sequence, tokens)
        if tokens not in self.texts:
            self.texts.append(tokens.copy())

    @precondition(lambda self: self.contents)
    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        self.write({sequence: data.draw(few_tokens) for sequence in self.contents})

    @precondition(lambda self: self.contents)
    @rule(token=st.integers(0, 1))
    def decode(self, token: int) -> None:
        self.write({sequence: [token] for sequence in self.contents})

    def write(self, lists: dict[PagedSequence, list[int]]) -> None:
        counts = [len(tokens) for tokens in lists.values()]
        before = [(list(s.blocks), s.num_tokens, s.version) for s in self.contents]
        free = self.allocator.num_free_blocks
        refused, pairs = None, []
        try:
            pairs = self.allocator.append(list(lists), counts)
        except OutOfBlocks as error:
            refused = error
        if refused is not None:
            assert refused.needed > refused.free == free == self.allocator.num_free_blocks
            assert before == [(list(s.blocks), s.num_tokens, s.version) for s in self.contents]
            return
        sources, destinations = {a for a, _ in pairs}, {b for _, b in pairs}
        assert len(destinations) == len(pairs)
        assert not sources & destinations
        for source, destination in pairs:
            copied = self.memory[source * P : (source + 1) * P]
            self.memory[destination * P : (destination + 1) * P] = copied
        written: set[int] = set()
        for sequence, tokens in lists.items():
            known = len(self.contents[sequence])
            self.contents[sequence] += tokens
            new = self.slots(sequence)[known:]
            assert not written & set(new)
            written |= set(new)
            for end, slot in enumerate(new, known + 1):
                self.memory[slot] = tuple(self.contents[sequence][:end])

    @precondition(lambda self: self.contents)
    @rule(data=st.data())
    def record_one(self, data: st.DataObject) -> None:
        self.record(self.pick(data))

    @precondition(lambda self: 0 < len(self.contents) < 5)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        sequence = self.pick(data)
        self.contents[self.allocator.fork(sequence)] = self.contents[sequence].copy()

    @precondition(lambda self: self.contents)
    @rule(data=st.data())
    def take_back(self, data: st.DataObject) -> None:
        sequence = self.pick(data)
        kept = data.draw(st.integers(0, sequence.num_tokens))
        self.allocator.truncate(sequence, kept)
        del self.contents[sequence][kept:]
        self.write({sequence: data.draw(few_tokens)})

    @precondition(lambda self: self.contents)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        sequence = self.pick(data)
        self.allocator.free(sequence)
        del self.contents[sequence]

    @precondition(lambda self: self.allocator.num_cached_blocks)
    @rule(count=st.none() | st.integers(0, 3))
    def evict(self, count: int | None) -> None:
        cached = self.allocator.num_cached_blocks
        evicted = self.allocator.evict(count)
        assert evicted == cached - self.allocator.num_cached_blocks
        assert evicted == cached if count is None else evicted == min(count, cached)

    @invariant()
    def every_sequence_reads_what_it_wrote(self) -> None:
        for sequence, tokens in self.contents.items():
            assert len(sequence.blocks) == -(-len(tokens) // P)
            for end, slot in enumerate(self.slots(sequence), 1):
                assert self.memory[slot] == tuple(tokens[:end])

    @invariant()
    def every_block_is_free_or_counted_once_for_each_owner(self) -> None:
        owned = Counter(block for sequence in self.contents for block in sequence.blocks)
        assert self.allocator.num_free_blocks == N - len(owned)
        owners = self.allocator._owners
        assert [owned[block] for block in range(N)] == owners
        free = [*self.allocator._empty, *self.allocator._cached]
        assert sorted(free) == [block for block in range(N) if not owned[block]]

    @invariant()
    def lists_of_blocks_have_versions_of_their_own(self) -> None:
        assert len({sequence.version for sequence in self.contents}) == len(self.contents)


TestServer = Server.TestCase
TestServer.settings = settings(
    max_examples=200, stateful_step_count=50, deadline=None, derandomize=True, database=None
)


def start(allocator: BlockAllocator, tokens: list[int]) -> PagedSequence:
    """Return a sequence with all of `tokens`, recorded."""
    sequence = allocator.allocate(tokens)
    assert not allocator.append([sequence], [len(tokens) - sequence.num_tokens])
    allocator.record(sequence, tokens)
    return sequence


def test_a_prompt_finds_the_full_blocks_of_its_prefix_also_after_their_owner_is_gone() -> None:
    allocator = BlockAllocator(N, P)
    tokens = list(range(11))
    first = start(allocator, tokens)
    second = allocator.allocate([*tokens[:8], 99, 99])
    assert second.blocks == first.blocks[:2]
    blocks = first.blocks[:2]
    for sequence in (first, second):
        allocator.free(sequence)
    assert allocator.num_free_blocks == N
    assert allocator.num_cached_blocks == 2
    assert allocator.allocate(tokens).blocks == blocks


def test_a_token_is_always_left_to_compute() -> None:
    allocator = BlockAllocator(N, P)
    tokens = list(range(2 * P))
    start(allocator, tokens)
    assert allocator.allocate(tokens).num_tokens == P
    assert allocator.allocate([*tokens, 1]).num_tokens == 2 * P


def test_equal_blocks_behind_different_ones_are_not_shared() -> None:
    allocator = BlockAllocator(N, P)
    start(allocator, [1] * P + [2] * P)
    assert allocator.allocate([3] * P + [2] * P + [0]).num_tokens == 0


def test_the_least_recently_owned_contents_are_evicted_first_and_ends_before_beginnings() -> None:
    allocator = BlockAllocator(4, P)
    old, new = [1] * (2 * P), [2] * (2 * P)
    for tokens in (old, new):
        allocator.free(start(allocator, tokens))
    allocator.append([allocator.allocate()], [1])
    assert allocator.allocate([*old, 0]).num_tokens == P
    assert allocator.allocate([*new, 0]).num_tokens == 2 * P


def test_forks_copy_the_block_that_they_go_on_in_and_the_last_of_them_keeps_it() -> None:
    allocator = BlockAllocator(N, P)
    first = start(allocator, list(range(P + 1)))
    forks = [first, allocator.fork(first), allocator.fork(first)]
    shared = first.blocks[1]
    pairs = allocator.append(forks, [1, 1, 1])
    assert pairs == [(shared, first.blocks[1]), (shared, forks[1].blocks[1])]
    assert forks[2].blocks[1] == shared
    assert len({fork.blocks[0] for fork in forks}) == 1
    assert allocator.append(forks, [1, 1, 1]) == []


def test_a_block_that_is_written_again_after_a_truncation_is_not_found_by_its_old_tokens() -> None:
    allocator = BlockAllocator(N, P)
    sequence = start(allocator, list(range(P)))
    allocator.truncate(sequence, 2)
    assert allocator.allocate([*range(P), 0]).num_tokens == P  # not yet written
    assert allocator.append([sequence], [1]) == [(0, 1)]
    other = start(allocator, [7] * P)
    allocator.truncate(other, 1)
    assert allocator.append([other], [1]) == []
    assert allocator.allocate([7] * P + [0]).num_tokens == 0


def test_what_follows_a_truncation_is_found_by_its_new_tokens_alone() -> None:
    allocator = BlockAllocator(N, P)
    sequence = start(allocator, [1] * (2 * P))
    allocator.truncate(sequence, 0)
    allocator.append([sequence], [2 * P])
    allocator.record(sequence, [2] * P + [1] * P)
    assert allocator.allocate([2] * P + [1] * P + [0]).blocks == sequence.blocks
    assert not set(allocator.allocate([1] * (2 * P) + [0]).blocks) & set(sequence.blocks)


def allocator_and_sequence() -> tuple[BlockAllocator, PagedSequence]:
    allocator = BlockAllocator(N, P)
    return allocator, start(allocator, list(range(P + 1)))


# fmt: off
S = "PagedSequence(num_tokens=5, blocks=[0, 1])"
BAD: list[tuple[Callable[[BlockAllocator, PagedSequence], object], str]] = [
    (lambda a, s: BlockAllocator(0, 4), "BlockAllocator: num_blocks must be at least 1, got 0"),
    (lambda a, s: BlockAllocator(4, -1), "BlockAllocator: block_size must be at least 1, got -1"),
    (lambda a, s: BlockAllocator(2**28, 16), "BlockAllocator: num_blocks must be of at most 2**31 slots, got 268435456 blocks of 16"),
    (lambda a, s: a.append([s, s], [1, 1]), "append: sequences must be distinct, got one twice"),
    (lambda a, s: a.append([s], [1, 1]), "append: counts must be one for each of 1 sequences, got 2"),
    (lambda a, s: a.append([s], [-1]), "append: counts must be at least 0, got -1"),
    (lambda a, s: BlockAllocator(4, 4).append([s], [1]), f"append: sequence must be one of this allocator, not freed, got {S}"),
    (lambda a, s: BlockAllocator(4, 4).fork(s), f"fork: sequence must be one of this allocator, not freed, got {S}"),
    (lambda a, s: BlockAllocator(4, 4).free(s), f"free: sequence must be one of this allocator, not freed, got {S}"),
    (lambda a, s: BlockAllocator(4, 4).record(s, []), f"record: sequence must be one of this allocator, not freed, got {S}"),
    (lambda a, s: a.record(s, [0] * 6), "record: tokens must be at most the 5 of the sequence, got 6"),
    (lambda a, s: a.truncate(s, 6), "truncate: num_tokens must be from 0 to the 5 of the sequence, got 6"),
]
# fmt: on


@pytest.mark.parametrize(("call", "says"), BAD)
def test_bad_input_is_named_and_changes_nothing(call, says) -> None:
    allocator, sequence = allocator_and_sequence()
    version = sequence.version
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole text is compared
        call(allocator, sequence)
    assert str(caught.value) == says
    assert (list(sequence.blocks), sequence.num_tokens) == ([0, 1], P + 1)
    assert sequence.version == version
    assert allocator.num_free_blocks == N - 2


def test_a_freed_sequence_is_refused() -> None:
    allocator, sequence = allocator_and_sequence()
    allocator.free(sequence)
    with pytest.raises(ValueError, match=r"free: sequence must be one of this allocator, not fr"):
        allocator.free(sequence)


def test_out_of_blocks_says_how_many_are_missing() -> None:
    allocator, sequence = allocator_and_sequence()
    room = N * P - sequence.num_tokens
    with pytest.raises(OutOfBlocks, match=r"^append: 13 blocks are needed, 12 are free$") as caught:
        allocator.append([sequence], [room + 1])
    assert (caught.value.needed, caught.value.free) == (13, 12)
    allocator.append([sequence], [room])


def test_a_step_of_256_sequences_is_planned_in_less_than_a_millisecond() -> None:
    """0.07 ms on a quiet machine; the bound is loose because test machines are not."""
    allocator = BlockAllocator(2**16, 16)
    sequences = [allocator.allocate() for _ in range(256)]
    allocator.append(sequences, range(1, 257))
    times = []
    for _ in range(64):
        begin = time.perf_counter()
        allocator.append(sequences, [1] * 256)
        times.append(time.perf_counter() - begin)
    assert statistics.median(times) < 1e-3
