"""The index tensors of a step over a paged cache, at addresses that never change."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate
from operator import sub
from typing import NamedTuple

import torch
from torch import Tensor

from torch_tkv.block_allocator import PagedSequence

_ALIGNMENT = 4  # int32 elements: Inductor copies an input that is not aligned to 16 bytes


class BatchIndices(NamedTuple):
    """Where the tokens of a step lie in their sequences and in the cache: int32, on one device.

    Tokens and sequences behind those of the step are padding, which the operators pass over.
    """

    positions: Tensor  # [T], 0 in padding
    slot_mapping: Tensor  # [T], the padding slot in padding
    block_table: Tensor  # [B, max_blocks], unspecified where seq_lens does not reach
    seq_lens: Tensor  # [B], keys after this step's writes; 0 in padding
    query_start_loc: Tensor  # [B + 1], flat in padding


class PagedBatch:
    """Index tensors for steps of up to a number of tokens and sequences.

    `update` fills them with one copy from the host and never moves them, so a CUDA graph that was
    captured with any of their views serves every later step. It may be called while earlier steps
    still run, on the stream that runs them.

    Args:
        max_tokens: most tokens of a step.
        max_sequences: most sequences of a step.
        max_blocks: most blocks of a sequence. A step copies 4 bytes for each block that a sequence
            may have, so a bound that is far too high costs time.
        block_size: P, tokens of a block.
        padding_slot: slot of padding tokens. The operators write nothing to a negative one; a model
            that writes in eager PyTorch, where -1 is the last slot, needs one that nobody reads.
        device: where the tensors live.

    Attributes:
        num_tokens: tokens of the step, without padding.
        num_sequences: sequences of the step, without padding.

    Raises:
        ValueError: a size is below 1.
    """

    def __init__(
        self,
        max_tokens: int,
        max_sequences: int,
        max_blocks: int,
        block_size: int,
        *,
        padding_slot: int = -1,
        device: torch.device | str = "cpu",
    ) -> None:
        sizes = {
            "max_tokens": max_tokens,
            "max_sequences": max_sequences,
            "max_blocks": max_blocks,
            "block_size": block_size,
        }
        for argument, size in sizes.items():
            if size < 1:
                raise ValueError(f"PagedBatch: {argument} must be at least 1, got {size}")
        self.max_tokens, self.max_sequences, self.max_blocks = max_tokens, max_sequences, max_blocks
        self.block_size, self.padding_slot = block_size, padding_slot
        self.num_tokens = self.num_sequences = 0
        # The block table comes last: what is copied ends with the last sequence of the step.
        ends = list(
            accumulate(
                -(size // -_ALIGNMENT) * _ALIGNMENT
                for size in (max_tokens, max_tokens, max_sequences, max_sequences + 1)
            )
        )
        self._begins = (0, *ends)
        self._memory = array("i", bytes(4 * (ends[-1] + max_sequences * max_blocks)))
        self._host = torch.frombuffer(self._memory, dtype=torch.int32)
        self._on_host = self._views(self._host)
        self._packed = self._host.to(device, copy=True)
        self._on_device = self._views(self._packed)
        self._upload = _Upload(self._packed)
        self._versions = [0] * max_sequences  # of the block lists in the table's rows
        self._indices: dict[tuple[int, int], BatchIndices] = {}
        self.update([])

    def __repr__(self) -> str:
        return (
            f"PagedBatch(max_tokens={self.max_tokens}, max_sequences={self.max_sequences}, "
            f"max_blocks={self.max_blocks}, block_size={self.block_size}, "
            f"device={self._packed.device}): {self.num_tokens} tokens of {self.num_sequences} "
            f"sequences, {self._packed.nbytes:,} bytes"
        )

    def indices(
        self, num_tokens: int | None = None, num_sequences: int | None = None
    ) -> BatchIndices:
        """Return the tensors of the first tokens and sequences, the same ones at every call.

        Args:
            num_tokens: T, padding included; None means max_tokens.
            num_sequences: B, padding included; None means max_sequences.

        Raises:
            ValueError: a number is negative or beyond the maximum.
        """
        tokens = self.max_tokens if num_tokens is None else num_tokens
        sequences = self.max_sequences if num_sequences is None else num_sequences
        for argument, size, most in (
            ("num_tokens", tokens, self.max_tokens),
            ("num_sequences", sequences, self.max_sequences),
        ):
            if not 0 <= size <= most:
                raise ValueError(f"indices: {argument} must be from 0 to {most}, got {size}")
        found = self._indices.get((tokens, sequences))
        if found is None:
            whole = self._on_device
            found = self._indices[tokens, sequences] = BatchIndices(
                whole.positions[:tokens],
                whole.slot_mapping[:tokens],
                whole.block_table[:sequences],
                whole.seq_lens[:sequences],
                whole.query_start_loc[: sequences + 1],
            )
            if self._packed.is_cuda:
                for index in found:
                    # Otherwise Inductor's CUDA graphs copy the tensors of a function's arguments.
                    torch._dynamo.mark_static_address(index)
        return found

    def update(
        self, sequences: Sequence[PagedSequence], counts: Sequence[int] | None = None
    ) -> None:
        """Fill the tensors for a step that computes the last `counts` tokens of each sequence.

        Args:
            sequences: sequences with slots for these tokens, in any order. None at all
                leaves nothing but padding, such as for the capture of a graph.
            counts: tokens of each sequence; None means one of each.

        Raises:
            ValueError: there are more tokens, sequences or blocks than the batch was made for, or a
                sequence has fewer tokens than its count. Nothing was changed.
        """
        if counts is None:
            counts = [1] * len(sequences)
        lengths = [sequence.num_tokens for sequence in sequences]
        versions = [sequence.version for sequence in sequences]
        self._check(sequences, counts, lengths)
        self.num_tokens, self.num_sequences = sum(counts), len(sequences)
        self._fill_table(sequences, versions)
        self._fill_sequences(counts, lengths)
        self._fill_tokens(decode=self.num_tokens == len(counts) == counts.count(1))
        self._upload(self._host[: self._begins[4] + len(sequences) * self.max_blocks])

    def _check(
        self, sequences: Sequence[PagedSequence], counts: Sequence[int], lengths: list[int]
    ) -> None:
        def require(ok: bool, argument: str, requirement: str, got: object) -> None:
            if not ok:
                raise ValueError(f"update: {argument} must be {requirement}, got {got}")

        given, most = len(sequences), self.max_blocks * self.block_size
        require(given <= self.max_sequences, "sequences", f"at most {self.max_sequences}", given)
        require(len(counts) == given, "counts", f"one for each of {given} sequences", len(counts))
        ok = min(counts, default=0) >= 0 and min(map(sub, lengths, counts), default=0) >= 0
        require(ok, "counts", "from 0 to the tokens of each sequence", list(counts))
        tokens, longest = sum(counts), max(lengths, default=0)
        require(tokens <= self.max_tokens, "counts", f"at most {self.max_tokens} in all", tokens)
        require(longest <= most, "sequences", f"of at most {most} tokens", longest)

    def _fill_table(self, sequences: Sequence[PagedSequence], versions: list[int]) -> None:
        for b, version in enumerate(versions):
            if version != self._versions[b]:
                blocks = sequences[b].blocks
                row = self._begins[4] + b * self.max_blocks
                self._memory[row : row + len(blocks)] = blocks
                self._versions[b] = version

    def _fill_sequences(self, counts: Sequence[int], lengths: list[int]) -> None:
        _, _, begin_lens, begin_starts, _ = self._begins
        padding = [0] * (self.max_sequences - len(lengths))
        starts = array("i", [*accumulate(counts, initial=0)])
        starts.extend(starts[-1:] * len(padding))
        self._memory[begin_lens : begin_lens + self.max_sequences] = array("i", lengths + padding)
        self._memory[begin_starts : begin_starts + len(starts)] = starts

    def _fill_tokens(self, *, decode: bool) -> None:
        tokens, host, size = self.num_tokens, self._on_host, self.block_size
        lengths = host.seq_lens[: self.num_sequences]
        rows = torch.arange(tokens, dtype=torch.int32)
        if decode:
            sequence, positions = rows, lengths - 1
        else:
            starts = host.query_start_loc[: self.num_sequences + 1]
            sequence = torch.repeat_interleave(starts.diff())
            positions = rows + (lengths - starts[1:])[sequence]
        blocks = host.block_table[sequence, positions // size]
        host.positions[:tokens] = positions
        host.slot_mapping[:tokens] = blocks * size + positions % size
        host.positions[tokens:] = 0
        host.slot_mapping[tokens:] = self.padding_slot

    def _views(self, packed: Tensor) -> BatchIndices:
        positions, slots, lens, starts, table = self._begins
        return BatchIndices(
            packed[positions : positions + self.max_tokens],
            packed[slots : slots + self.max_tokens],
            packed[table:].view(self.max_sequences, self.max_blocks),
            packed[lens : lens + self.max_sequences],
            packed[starts : starts + self.max_sequences + 1],
        )


class _Upload:
    """Copies the head of a host tensor to a device without waiting for the device."""

    def __init__(self, target: Tensor) -> None:
        self._target = target
        if target.is_cuda:
            # Two, in turn: one is filled while the copy out of the other may not be done.
            self._pinned = [
                torch.empty_like(target, device="cpu", pin_memory=True) for _ in range(2)
            ]
            self._done = [torch.cuda.Event() for _ in range(2)]

    def __call__(self, host: Tensor) -> None:
        target = self._target[: len(host)]
        if not target.is_cuda:
            target.copy_(host)
            return
        self._pinned.reverse()
        self._done.reverse()
        self._done[0].synchronize()
        target.copy_(self._pinned[0][: len(host)].copy_(host), non_blocking=True)
        self._done[0].record(torch.cuda.current_stream(target.device))
