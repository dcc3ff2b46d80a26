"""Serve the small model: requests arrive, and each step batches what there is to compute.

A step takes one token of every request that generates and fills up with pieces of prompts, all in
one batch over one paged cache. On a GPU it replays a CUDA graph of the size that fits. This is no
server: requests come from a list. `--compare` serves them one after the other too.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from llama import Llama, load_model
from torch import Tensor

from torch_tkv import (
    BatchIndices,
    BlockAllocator,
    GraphLadder,
    OutOfBlocks,
    PagedBatch,
    PagedKVCache,
    PagedSequence,
)

END = 0  # the byte between two files of the training text


@dataclass(eq=False)
class Request:
    """A prompt to continue, and what became of it."""

    prompt: list[int]
    max_new_tokens: int
    arrival: float = 0.0  # seconds since the start
    generated: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # when each of these was there
    sequence: PagedSequence | None = None

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.generated

    @property
    def done(self) -> bool:
        return len(self.generated) == self.max_new_tokens or self.generated[-1:] == [END]


class Work(NamedTuple):
    """What a request computes in a step."""

    request: Request
    sequence: PagedSequence
    count: int  # tokens


class Engine:
    """Continuous batching of requests to one model, in the order in which they came.

    Args:
        model: takes tokens and the indices of a batch.
        num_blocks: blocks of the cache.
        block_size: tokens of a block.
        max_tokens: most tokens of a step.
        max_sequences: most requests of a step.
        compiled: whether to compile the model.
    """

    def __init__(
        self,
        model: Llama,
        *,
        num_blocks: int = 512,
        block_size: int = 16,
        max_tokens: int = 256,
        max_sequences: int = 32,
        compiled: bool = False,
    ) -> None:
        config, weight = model.config, model.embedding.weight
        device, self.max_tokens, self.max_sequences = weight.device, max_tokens, max_sequences
        # The model writes as eager PyTorch does, so padding gets a block that no request owns.
        self.cache = PagedKVCache(
            config.num_layers,
            config.num_kv_heads,
            config.head_dim,
            block_size=block_size,
            num_blocks=num_blocks + 1,
            dtype=weight.dtype,
            device=device,
        )
        for number, layer in enumerate(model.layers):
            caches = self.cache.layer(number)
            layer.attention.register_buffer("k_cache", caches.key_cache, persistent=False)
            layer.attention.register_buffer("v_cache", caches.value_cache, persistent=False)
        self.allocator = BlockAllocator(num_blocks, block_size)
        self.longest = min(config.max_positions, num_blocks * block_size)
        self.batch = PagedBatch(
            max_tokens,
            max_sequences,
            -(self.longest // -block_size),
            block_size,
            padding_slot=num_blocks * block_size,
            device=device,
        )
        self.tokens = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self.model = torch.compile(model, backend="tkv") if compiled else model
        with torch.no_grad():
            self.decode = GraphLadder(
                lambda size: self._next_tokens(size, size), sizes(1, max_sequences), device=device
            )
            self.mixed = GraphLadder(
                lambda size: self._next_tokens(size, max_sequences),
                sizes(min(16, max_tokens), max_tokens),
                device=device,
            )
        if compiled:  # before the first request, wherever it runs
            for ladder in (self.decode, self.mixed):
                for size in ladder.sizes:
                    with torch.no_grad():
                        ladder(size)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def submit(self, request: Request) -> None:
        """Take a request.

        Raises:
            ValueError: it could need more tokens than the model or the cache has room for.
        """
        needed = len(request.prompt) + request.max_new_tokens
        if not request.prompt or needed > self.longest:
            raise ValueError(f"submit: request must have 1 to {self.longest} tokens, got {needed}")
        self.waiting.append(request)

    @torch.no_grad()
    def step(self) -> list[Request]:
        """Compute a step; return the requests that have one more token."""
        self._admit()
        work = self._reserve()
        sequences, counts = [w.sequence for w in work], [w.count for w in work]
        self.batch.update(sequences, counts)
        new = chain.from_iterable(
            w.request.tokens[w.sequence.num_tokens - w.count : w.sequence.num_tokens] for w in work
        )
        self.tokens[: sum(counts)].copy_(torch.tensor(list(new)))
        only_decode = sum(counts) == len(work)
        ladder, size = (self.decode, len(work)) if only_decode else (self.mixed, sum(counts))
        grown = []
        for w, token in zip(work, ladder(size)[: len(work)].tolist(), strict=True):
            if w.sequence.num_tokens == len(w.request.tokens):  # else more of the prompt is left
                w.request.generated.append(token)
                grown.append(w.request)
        for request in [request for request in grown if request.done]:
            self._release(request)
            self.running.remove(request)
        return grown

    def _next_tokens(self, num_tokens: int, num_sequences: int) -> Tensor:
        """Return the likeliest token [num_sequences] after each sequence of the batch."""
        # Other tensors in the same memory: torch.compile compiles once for each that is marked as
        # static, as these are, and the graphs here are not those of Inductor.
        indices = BatchIndices(*(t[:] for t in self.batch.indices(num_tokens, num_sequences)))
        logits = self.model(self.tokens[:num_tokens], indices)
        last = (indices.query_start_loc[1:] - 1).clamp(min=0)
        return logits[last].argmax(-1)

    def _admit(self) -> None:
        """Begin waiting requests while there are blocks for all of their tokens so far."""
        while self.waiting and len(self.running) < self.max_sequences:
            blocks = -(len(self.waiting[0].tokens) // -self.allocator.block_size)
            if blocks > self.allocator.num_free_blocks and self.running:
                break
            request = self.waiting.popleft()
            request.sequence = self.allocator.allocate(request.tokens)  # shares known prefixes
            self.running.append(request)

    def _reserve(self) -> list[Work]:
        """Choose the work of a step and give it slots; without room, the newest has to wait."""
        while True:
            work = self._choose()
            try:
                pairs = self.allocator.append([w.sequence for w in work], [w.count for w in work])
            except OutOfBlocks:
                newest = self.running.pop()
                self._release(newest)
                self.waiting.appendleft(newest)
            else:
                self.cache.copy_blocks(pairs)
                return work

    def _choose(self) -> list[Work]:
        """Return every request that has one token to compute, then prompts, as many as fit."""
        todo = []
        for request in self.running:
            assert request.sequence is not None
            left = len(request.tokens) - request.sequence.num_tokens
            todo.append(Work(request, request.sequence, left))
        chosen, room = [], self.max_tokens
        for work in sorted(todo, key=lambda work: work.count > 1):
            if room > 0:
                chosen.append(work._replace(count=min(work.count, room)))
                room -= chosen[-1].count
        return chosen

    def _release(self, request: Request) -> None:
        """Free a request's blocks; whoever begins with the same tokens may find them."""
        sequence, request.sequence = request.sequence, None
        assert sequence is not None
        self.allocator.record(sequence, request.tokens[: sequence.num_tokens])
        self.allocator.free(sequence)


def sizes(first: int, last: int) -> list[int]:
    """Return `first`, its doubles below `last`, and `last`."""
    return [*(first << i for i in range(last.bit_length()) if first << i < last), last]


def serve(
    engine: Engine, requests: Iterable[Request], clock: Callable[[], float] = time.perf_counter
) -> float:
    """Serve requests as they arrive; return the seconds it took."""
    coming = deque(sorted(requests, key=lambda request: request.arrival))
    begin = clock()
    while coming or engine.waiting or engine.running:
        while coming and coming[0].arrival <= clock() - begin:
            engine.submit(coming.popleft())
        if engine.waiting or engine.running:
            for request in engine.step():
                request.times.append(clock() - begin)
        else:
            time.sleep(max(0.0, coming[0].arrival - (clock() - begin)))
    return clock() - begin


def make_requests(args: argparse.Namespace) -> list[Request]:
    """Return requests to continue pieces of this file's neighbours, at random times."""
    rng = random.Random(args.seed)
    text = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    requests, now = [], 0.0
    for _ in range(args.requests):
        count = rng.randint(1, args.max_prompt)
        start = rng.randrange(len(text) - count)
        new = rng.randint(1, args.max_new_tokens)
        requests.append(Request(list(text[start : start + count]), new, now))
        if args.rate > 0:
            now += rng.expovariate(args.rate)
    return requests


def percentiles(name: str, seconds: list[float]) -> str:
    at = torch.tensor(seconds).quantile(torch.tensor([0.5, 0.9, 0.99])).mul(1e3).tolist()
    return f"  {name:<24} {at[0]:9.1f} {at[1]:9.1f} {at[2]:9.1f}"


def report(name: str, requests: list[Request], seconds: float) -> None:
    """Print throughput and latencies."""
    prompts = sum(len(request.prompt) for request in requests)
    generated = sum(len(request.generated) for request in requests)
    gaps = [b - a for r in requests for a, b in zip(r.times, r.times[1:], strict=False)]
    print(
        f"{name}: {len(requests)} requests in {seconds:.2f} s, "
        f"{len(requests) / seconds:.1f} requests/s, {generated / seconds:,.0f} tokens/s generated, "
        f"{prompts / seconds:,.0f} tokens/s of prompts"
    )
    print(f"  {'ms, percentiles':<24} {'50':>9} {'90':>9} {'99':>9}")
    print(percentiles("to the first token", [r.times[0] - r.arrival for r in requests]))
    if gaps:
        print(percentiles("between tokens", gaps))
    print(percentiles("to the last token", [r.times[-1] - r.arrival for r in requests]))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rate", type=float, default=0.0, help="a second; 0: all at once")
    parser.add_argument("--max-prompt", type=int, default=256, help="most bytes of a prompt")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="most of a request")
    parser.add_argument("--max-tokens", type=int, default=256, help="most tokens of a step")
    parser.add_argument("--max-sequences", type=int, default=32, help="most requests of a step")
    parser.add_argument("--num-blocks", type=int, default=512)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda)
    parser.add_argument("--compare", action="store_true", help="serve one at a time too")
    parser.add_argument("--weights", type=Path, default=Path(__file__).parent / "stdlib-bytes")
    parser.add_argument("--seed", type=int, default=0, help="of the requests")
    return parser.parse_args(argv)


def run(args: argparse.Namespace, name: str, max_sequences: int) -> list[Request]:
    """Serve the requests with so many at a time, report, and return them."""
    model = load_model(args.weights, torch.device(args.device), getattr(torch, args.dtype))
    engine = Engine(
        model,
        num_blocks=args.num_blocks,
        block_size=args.block_size,
        max_tokens=max(args.max_tokens, max_sequences),
        max_sequences=max_sequences,
        compiled=args.compile,
    )
    requests = make_requests(args)
    report(name, requests, serve(engine, requests))
    return requests


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    requests = run(args, "batched", args.max_sequences)
    if args.compare:
        alone = run(args, "one at a time", 1)
        same = sum(a.generated == b.generated for a, b in zip(requests, alone, strict=True))
        print(f"{same} of {len(requests)} requests have the same text both ways")


if __name__ == "__main__":
    main()
