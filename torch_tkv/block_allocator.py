"""Which blocks of a paged cache belong to which sequence: bookkeeping on the host, no tensors."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections import OrderedDict
from collections.abc import Sequence

# Note [Versions of a block list]
# Whoever copied a sequence's blocks asks one integer whether the copy is still right: each change
# of any block list takes a number that no list of this process had before.
_versions = itertools.count(1)


class OutOfBlocks(RuntimeError):
    """More blocks were asked for than are free; nothing was changed.

    Attributes:
        needed: blocks that the call needed.
        free: blocks that it could have had.
    """

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(f"append: {needed} blocks are needed, {free} are free")
        self.needed, self.free = needed, free


class PagedSequence:
    """A sequence and its blocks, made by a `BlockAllocator` and changed by it alone.

    Attributes:
        blocks: numbers of its blocks, in order, each an int32.
        num_tokens: tokens that have a slot: token `i` has `blocks[i // P] * P + i % P`.
        version: a number that changes whenever `blocks` does, unlike that of any other sequence.
    """

    __slots__ = ("blocks", "digests", "num_tokens", "version")

    def __init__(self, blocks: array[int], num_tokens: int, digests: list[bytes]) -> None:
        self.blocks, self.num_tokens = blocks, num_tokens
        self.digests = digests  # of the leading blocks whose tokens were recorded
        self.version = next(_versions)

    def __repr__(self) -> str:
        return f"PagedSequence(num_tokens={self.num_tokens}, blocks={list(self.blocks)})"


class BlockAllocator:
    """Hands out the blocks of a paged cache to sequences, which may share them.

    A block has an owner for each sequence that holds it, and is written only while it has one: a
    sequence that appends to a block of several takes a copy first. Full blocks whose tokens were
    recorded are found again by those tokens and all before them; a block that nobody owns keeps
    its contents for that until it is needed, the least recently owned first.

    Example::

        sequence = allocator.allocate(prompt)  # owns what the cache has of the prompt already
        while ...:
            cache.copy_blocks(allocator.append([sequence], [num_new]))
            batch.update([sequence], [num_new])
            ...  # one step of the model
            allocator.record(sequence, tokens)  # others may share them from now on
        allocator.free(sequence)

    Args:
        num_blocks: N, blocks of the cache.
        block_size: P, tokens of a block.

    Raises:
        ValueError: a size is below 1, or slot numbers would not fit in int32.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        for argument, size in (("num_blocks", num_blocks), ("block_size", block_size)):
            if size < 1:
                raise ValueError(f"BlockAllocator: {argument} must be at least 1, got {size}")
        if num_blocks * block_size > 2**31:
            text = f"of at most 2**31 slots, got {num_blocks} blocks of {block_size}"
            raise ValueError(f"BlockAllocator: num_blocks must be {text}")
        self.num_blocks, self.block_size = num_blocks, block_size
        self._sequences: set[PagedSequence] = set()
        self._owners = [0] * num_blocks
        # A block without an owner is in one of these two: with contents to be found, or without.
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks without an owner, which the next calls can have."""
        return len(self._empty) + len(self._cached)

    @property
    def num_cached_blocks(self) -> int:
        """Free blocks whose contents `allocate` can still find."""
        return len(self._cached)

    def allocate(self, tokens: Sequence[int] = ()) -> PagedSequence:
        """Begin a sequence, with the blocks that hold the longest recorded prefix of `tokens`.

        The prefix ends with a full block and before the last token: there is always a token left
        to compute. `num_tokens` of the sequence says how many need not be.

        Args:
            tokens: token numbers of the prompt; without them nothing is shared.
        """
        blocks = array("i")
        digests: list[bytes] = []
        for i in range((len(tokens) - 1) // self.block_size):
            digest = self._digest(digests, tokens, i)
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
            digests.append(digest)
        self._own(blocks)
        return self._add(PagedSequence(blocks, len(blocks) * self.block_size, digests))

    def append(
        self, sequences: Sequence[PagedSequence], counts: Sequence[int]
    ) -> list[tuple[int, int]]:
        """Give each sequence slots for `counts` more tokens, all of them or none.

        Args:
            sequences: distinct sequences of this allocator.
            counts: tokens to add to each.

        Returns:
            Pairs (source, destination) of blocks to copy before the new tokens are written, as
            `copy_blocks` takes them.

        Raises:
            OutOfBlocks: there are not enough; free or evict sequences. Nothing was changed.
            ValueError: a sequence comes twice or is not of this allocator, counts are not one a
                sequence, or one is negative. Nothing was changed.
        """
        self._require_live("append", sequences)
        if len(set(sequences)) < len(sequences):
            raise ValueError("append: sequences must be distinct, got one twice")
        if len(counts) != len(sequences):
            raise ValueError(
                f"append: counts must be one for each of {len(sequences)} sequences, "
                f"got {len(counts)}"
            )
        if counts and min(counts) < 0:
            raise ValueError(f"append: counts must be at least 0, got {min(counts)}")
        size, owners = self.block_size, self._owners
        growing: list[tuple[PagedSequence, int]] = []
        copying: list[PagedSequence] = []
        leaving: dict[int, int] = {}
        overwritten: list[int] = []
        needed = 0
        for sequence, count in zip(sequences, counts, strict=True):
            blocks = sequence.blocks
            room = len(blocks) * size - sequence.num_tokens
            if count > room:
                more = -((count - room) // -size)
                growing.append((sequence, more))
                needed += more
            if room and count:
                last = blocks[-1]
                # Of the owners of a block that append to it now, the last one may keep it.
                if owners[last] > 1 and owners[last] - leaving.get(last, 0) > 1:
                    leaving[last] = leaving.get(last, 0) + 1
                    copying.append(sequence)
                elif last in self._digest_of:
                    overwritten.append(last)
        needed += len(copying)
        if needed > self.num_free_blocks:
            raise OutOfBlocks(needed, self.num_free_blocks)

        for block in overwritten:
            self._forget(block)
        pairs = [self._replace_last(sequence) for sequence in copying]
        for sequence, more in growing:
            sequence.blocks.extend([self._take() for _ in range(more)])
            sequence.version = next(_versions)
        for sequence, count in zip(sequences, counts, strict=True):
            sequence.num_tokens += count
        return pairs

    def record(self, sequence: PagedSequence, tokens: Sequence[int]) -> None:
        """Say which tokens a sequence holds: its full blocks can be shared from now on.

        Call it once the step that computes them was launched, whenever more blocks are full or
        only before `free`.

        Args:
            sequence: a sequence of this allocator.
            tokens: token numbers from the first on, at most `num_tokens`; those of blocks that
                were recorded before are not read again.

        Raises:
            ValueError: the sequence is not of this allocator or has fewer tokens.
        """
        self._require_live("record", (sequence,))
        if len(tokens) > sequence.num_tokens:
            raise ValueError(
                f"record: tokens must be at most the {sequence.num_tokens} of the sequence, "
                f"got {len(tokens)}"
            )
        for i in range(len(sequence.digests), len(tokens) // self.block_size):
            digest = self._digest(sequence.digests, tokens, i)
            sequence.digests.append(digest)
            block = sequence.blocks[i]
            if digest not in self._block_of and block not in self._digest_of:
                self._block_of[digest] = block
                self._digest_of[block] = digest

    def fork(self, sequence: PagedSequence) -> PagedSequence:
        """Return a sequence that goes on from where `sequence` is, sharing all of its blocks.

        Raises:
            ValueError: the sequence is not of this allocator.
        """
        self._require_live("fork", (sequence,))
        blocks = sequence.blocks[:]
        self._own(blocks)
        return self._add(PagedSequence(blocks, sequence.num_tokens, sequence.digests.copy()))

    def truncate(self, sequence: PagedSequence, num_tokens: int) -> None:
        """Drop the last tokens of a sequence, as when drafted ones are rejected.

        Args:
            sequence: a sequence of this allocator.
            num_tokens: tokens to keep, at most those that it has.

        Raises:
            ValueError: the sequence is not of this allocator or has fewer tokens.
        """
        self._require_live("truncate", (sequence,))
        if not 0 <= num_tokens <= sequence.num_tokens:
            raise ValueError(
                f"truncate: num_tokens must be from 0 to the {sequence.num_tokens} of the "
                f"sequence, got {num_tokens}"
            )
        kept = -(num_tokens // -self.block_size)
        dropped = sequence.blocks[kept:]
        del sequence.blocks[kept:], sequence.digests[num_tokens // self.block_size :]
        sequence.num_tokens, sequence.version = num_tokens, next(_versions)
        self._disown(dropped)

    def free(self, sequence: PagedSequence) -> None:
        """End a sequence: its blocks are free, but for those that others own.

        Raises:
            ValueError: the sequence is not of this allocator, or was freed before.
        """
        self._require_live("free", (sequence,))
        self.truncate(sequence, 0)
        self._sequences.remove(sequence)

    def evict(self, count: int | None = None) -> int:
        """Forget the contents of `count` free blocks, of all where it is None; return how many."""
        count = len(self._cached) if count is None else min(count, len(self._cached))
        for _ in range(count):
            self._empty.append(self._evict())
        return count

    def _require_live(self, function: str, sequences: Sequence[PagedSequence]) -> None:
        if not self._sequences.issuperset(sequences):
            foreign = next(s for s in sequences if s not in self._sequences)
            raise ValueError(
                f"{function}: sequence must be one of this allocator, not freed, got {foreign}"
            )

    def _digest(self, before: list[bytes], tokens: Sequence[int], i: int) -> bytes:
        """Return the digest of full block `i` of `tokens`, and so of all `before` it."""
        block = array("q", tokens[i * self.block_size : (i + 1) * self.block_size])
        parent = before[-1] if before else b""
        return hashlib.blake2b(parent + block.tobytes(), digest_size=16).digest()

    def _add(self, sequence: PagedSequence) -> PagedSequence:
        self._sequences.add(sequence)
        return sequence

    def _take(self) -> int:
        """Return a free block, now owned."""
        block = self._empty.pop() if self._empty else self._evict()
        self._owners[block] = 1
        return block

    def _evict(self) -> int:
        """Return the free block that was owned least recently, its contents forgotten."""
        block, _ = self._cached.popitem(last=False)
        self._forget(block)
        return block

    def _forget(self, block: int) -> None:
        del self._block_of[self._digest_of.pop(block)]

    def _own(self, blocks: array[int]) -> None:
        for block in blocks:
            self._owners[block] += 1
            if self._owners[block] == 1:
                del self._cached[block]

    def _disown(self, blocks: array[int]) -> None:
        # Backwards: a prefix outlives what follows it, which is not found without it.
        for block in reversed(blocks):
            self._owners[block] -= 1
            if not self._owners[block]:
                if block in self._digest_of:
                    self._cached[block] = None
                else:
                    self._empty.append(block)

    def _replace_last(self, sequence: PagedSequence) -> tuple[int, int]:
        """Give a sequence a block of its own for its last one; return both, the old one first."""
        shared, own = sequence.blocks[-1], self._take()
        self._owners[shared] -= 1
        sequence.blocks[-1] = own
        sequence.version = next(_versions)
        return shared, own
