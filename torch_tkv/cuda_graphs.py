"""A step as CUDA graphs of a few sizes, of which each call replays the smallest that fits."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch

Result = TypeVar("Result")


class GraphLadder(Generic[Result]):
    """Captures a step once for each of a ladder of sizes and replays the smallest that fits.

    The graphs share one memory pool and are captured from the largest to the smallest, so that all
    of them together take little more than the largest. So they must not run at the same time, and
    what a call returned is overwritten by the next.

    On a CPU there are no graphs: a call runs the step, at the size that a graph would have.

    Example::

        batch = PagedBatch(256, 256, max_blocks, block_size, device="cuda")
        tokens = torch.zeros(256, dtype=torch.int64, device="cuda")
        with torch.inference_mode():
            decode = GraphLadder(
                lambda size: model(tokens[:size], batch.indices(size, size)), [1, 2, 4, 8, 256]
            )
            ...
            batch.update(sequences)
            logits = decode(len(sequences))[: len(sequences)]

    Args:
        step: takes a size and computes on static tensors of that size, padding included. It is
            called outside of a capture first, so its warm-up may compile; those calls compute on
            what the tensors hold, so let a batch hold padding only.
        sizes: the sizes to capture.
        device: where the step runs.
        warmup: calls of each size before its capture.

    Raises:
        ValueError: sizes has none, or one below 1; warmup is below 1.
    """

    def __init__(
        self,
        step: Callable[[int], Result],
        sizes: Iterable[int],
        *,
        device: torch.device | str = "cuda",
        warmup: int = 2,
    ) -> None:
        self.sizes = sorted(set(sizes))
        if not self.sizes or self.sizes[0] < 1:
            raise ValueError(f"GraphLadder: sizes must be some, each at least 1, got {self.sizes}")
        if warmup < 1:
            raise ValueError(f"GraphLadder: warmup must be at least 1, got {warmup}")
        self.device = torch.device(device)
        self._step = step
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, Result]] = {}
        if self.device.type == "cuda":
            self._capture(warmup)

    def size_for(self, size: int) -> int:
        """Return the size that a call with `size` runs at.

        Raises:
            ValueError: there is none as large.
        """
        if not 0 <= size <= self.sizes[-1]:
            most = self.sizes[-1]
            raise ValueError(f"GraphLadder: size must be from 0 to the largest, {most}, got {size}")
        return self.sizes[bisect_left(self.sizes, size)]

    def __call__(self, size: int) -> Result:
        """Run the step at the smallest captured size that is at least `size`.

        Returns:
            What the step returned at that size, padding included: on a GPU the same tensors at each
            call, with other contents.

        Raises:
            ValueError: there is no size as large.
        """
        size = self.size_for(size)
        if not self._captured:
            return self._step(size)
        graph, result = self._captured[size]
        graph.replay()
        return result

    def _capture(self, warmup: int) -> None:
        pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()
            for size in reversed(self.sizes):
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(warmup):
                        self._step(size)
                torch.cuda.current_stream().wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                # Other threads go on: those of a server, the watchdog of NCCL.
                with torch.cuda.graph(
                    graph, pool=pool, stream=stream, capture_error_mode="thread_local"
                ):
                    result = self._step(size)
                self._captured[size] = graph, result
