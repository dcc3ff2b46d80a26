"""tkv::concat_and_cache_mla against Inductor's code for the eager write, plain copies and vLLM.

`python benchmarks/concat_and_cache_mla.py --csv mla.csv --plot mla.png`
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import harness
import torch
from harness import Call, Case, P, optional
from inputs import DTYPES, bits, make_slots, randn, to_cache
from torch import Tensor

import torch_tkv
from torch_tkv import reference

# Latent and rope sizes of DeepSeek's models.
R, PE = 512, 64


def count_bytes(tokens: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> int:
    """Return what a write of the latent and rope parts reads and writes."""
    return tokens * (R + PE) * (dtype.itemsize + cache_dtype.itemsize)


def make_cases(tokens: int, sets: int, options: argparse.Namespace) -> Iterator[Case]:
    """Yield a case for each dtype of the cache."""
    for name in options.dtypes:
        yield make_case(tokens, sets, name)


def make_case(tokens: int, sets: int, name: str) -> Case:
    """Return all ways to write `tokens` rows into a cache of one dtype."""
    dtype = DTYPES[name]
    num_blocks, slots = make_slots(tokens, sets)
    cache = randn(num_blocks, P, R + PE).to(dtype)
    rows = [(randn(tokens, R), randn(tokens, PE)) for _ in slots]
    places = [(s // P, s % P) for s in slots]
    targets = [torch.empty_like(part, dtype=dtype) for part in rows[0]]

    def reset() -> None:
        bits(cache).zero_()

    def tkv(i: int) -> Sequence[Tensor]:
        torch_tkv.concat_and_cache_mla(*rows[i], cache, slots[i])
        return [cache]

    @torch.compile(fullgraph=True, dynamic=False)
    def write(kv_c: Tensor, k_pe: Tensor, cache: Tensor, blocks: Tensor, offsets: Tensor) -> None:
        cache[blocks, offsets] = to_cache(torch.cat((kv_c, k_pe), -1), dtype)

    def inductor(i: int) -> Sequence[Tensor]:
        write(*rows[i], bits(cache), *places[i])
        return [cache]

    def copy(i: int) -> Sequence[Tensor]:
        for target, part in zip(targets, rows[i], strict=True):
            target.copy_(part)
        return targets

    calls = {"tkv": tkv, "inductor cache[b, o] = cat": inductor}
    calls |= vllm_calls(rows, cache, slots)
    reset()
    expected = cache.clone()
    reference.concat_and_cache_mla(*rows[0], expected, slots[0])
    size = count_bytes(tokens, torch.bfloat16, dtype)
    return Case(name, tokens, size, reset, [expected], calls, {"torch copies": copy})


def vllm_calls(
    rows: Sequence[tuple[Tensor, Tensor]], cache: Tensor, slots: Sequence[Tensor]
) -> dict[str, Call]:
    """Return vLLM's own kernel, if vLLM is installed."""
    ops = optional("vllm._custom_ops")
    if ops is None:
        return {}
    kind = "fp8" if cache.dtype.itemsize == 1 else "auto"
    scale = torch.ones(1, device="cuda")

    def call(i: int) -> Sequence[Tensor]:
        ops.concat_and_cache_mla(*rows[i], bits(cache), slots[i], kind, scale)
        return [cache]

    return {"vllm": call}


if __name__ == "__main__":
    parser = harness.parser(__doc__)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    harness.run("concat_and_cache_mla", make_cases, parser.parse_args())
