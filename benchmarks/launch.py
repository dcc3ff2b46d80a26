"""Host cost of one eager call: an operator, a plain Triton launch of its kernel, an aten operator.

`python benchmarks/launch.py --csv launch.csv`
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import harness
import torch
from harness import HKV, D, P, Row
from inputs import make_cache, make_slots, randn
from torch import Tensor

from torch_tkv.kernels import reshape_and_cache

CALLS = 300
TOKENS = 4
SIGNATURES = 1000
# KV heads and head sizes of eight models whose calls alternate.
MODELS = ((8, 128), (4, 128), (2, 64), (32, 128), (8, 64), (16, 256), (1, 256), (13, 80))


def make_arguments(tokens: int, heads: int, head_size: int) -> tuple[Tensor, ...]:
    """Return the arguments of a write into a small cache."""
    _, (slots,) = make_slots(tokens, 1)
    caches = torch.randn(2, 4096, P, heads, head_size, device="cuda").bfloat16()
    kv = torch.randn(2, tokens, heads, head_size, device="cuda").bfloat16()
    return (*kv, *caches, slots)


def plain(*args: Tensor) -> Callable[[], object]:
    """Return Triton's own launch of the kernel that the operator launches for `args`."""
    launch = reshape_and_cache.prepare(*args)
    arguments = (*launch.tensors, *launch.scalars, *launch.constexprs)
    return lambda: launch.kernel[launch.grid](*arguments, **launch.options)


def host_us(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median host time of each call, in us, in rounds that take turns."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in harness.progress(range(repeats), unit="round"):
        for name, call in calls.items():
            call()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(CALLS):
                call()
            samples[name].append((time.perf_counter() - begin) / CALLS * 1e6)
            torch.cuda.synchronize()
    return {name: statistics.median(times) for name, times in samples.items()}


def measure(repeats: int) -> list[Row]:
    """Measure the call alone, after many signatures, and alternating between models."""
    write = torch.ops.tkv.reshape_and_cache.default  # as compiled code calls it
    args = make_arguments(TOKENS, HKV, D)
    target = torch.empty_like(args[0])
    calls: dict[str, Callable[[], object]] = {
        "torch.ops.tkv": lambda: write(*args),
        "kernel[grid](...)": plain(*args),
        "aten copy_": lambda: target.copy_(args[0]),
    }
    seen = {"fresh": host_us(calls, repeats)}
    cache = make_cache("NHD", torch.bfloat16, 4096)
    for tokens in harness.progress(range(1, SIGNATURES + 1), unit="signature"):
        slots = torch.arange(tokens, device="cuda")
        write(randn(tokens, HKV, D), randn(tokens, HKV, D), cache, cache, slots)
    seen[f"after {SIGNATURES} other signatures"] = host_us(calls, repeats)
    models = [make_arguments(TOKENS, *model) for model in MODELS]
    launches = [plain(*args) for args in models]
    alternating: dict[str, Callable[[], object]] = {
        "torch.ops.tkv": lambda: [write(*args) for args in models],
        "kernel[grid](...)": lambda: [launch() for launch in launches],
    }
    rounds = host_us(alternating, repeats)
    seen[f"alternating between {len(MODELS)} models"] = {
        name: us / len(MODELS) for name, us in rounds.items()
    }
    machine = harness.describe_machine()
    return [
        Row("launch", case, name, TOKENS, "host", us, None, None, *machine)
        for case, times in seen.items()
        for name, us in times.items()
    ]


def main() -> None:
    """Measure with and without autograd's bookkeeping, print and write."""
    parser = harness.host_parser(__doc__)
    parser.add_argument("--grad", action="store_true", help="outside of torch.inference_mode()")
    options = parser.parse_args()
    harness.require_gpu()
    with torch.inference_mode(not options.grad):
        rows = measure(options.repeats)
        harness.report(rows, harness.measure_ceilings(options.repeats), options.csv)


if __name__ == "__main__":
    main()
