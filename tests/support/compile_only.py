"""Compile, without a GPU, exactly what the kernels' `prepare` functions describe.

`python compile_only.py <target>` sends launches on meta tensors to Triton's compiler for the named
target and prints one JSON object a launch. It is a program of its own because tests without a GPU
import Triton in interpreter mode, where nothing can be compiled.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from torch_tkv.kernels import (
    concat_and_cache_mla,
    copy_blocks,
    gather_cache,
    paged_attention,
    qk_norm_rope_reshape_and_cache,
    reshape_and_cache,
    reshape_and_cache_dynamic,
    reshape_and_cache_head_major,
    reshape_and_cache_packed,
    rope_reshape_and_cache,
    rotary_embedding,
)
from torch_tkv.kernels.launcher import run

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def source_of(kernel: JITFunction, args: tuple[Any, ...]) -> ASTSource:
    """Specialise `kernel` as Triton would for `args`: ints of 1, multiples of 16, pointers."""
    signature, constants, attrs = {}, {}, {}
    for i, (param, arg) in enumerate(zip(kernel.params, args, strict=True)):
        specialise = not param.do_not_specialize
        if isinstance(arg, Tensor):
            signature[param.name] = POINTERS[arg.dtype]
            attrs[(i,)] = [["tt.divisibility", 16]]
        elif param.is_constexpr or arg is None or (arg == 1 and specialise):
            signature[param.name], constants[(i,)] = "constexpr", arg
        elif isinstance(arg, int):
            signature[param.name] = "i32"
            if arg % 16 == 0 and specialise:
                attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "fp32"
    return ASTSource(kernel, signature, constants, attrs)


def compile_launches(target: GPUTarget) -> Iterator[dict[str, Any]]:
    """Yield what the compiler says of every launch of `launches()`."""
    compiled = []

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append(triton.compile(source_of(kernel, args), target=target, options=options))

    JITFunction.run = run
    dtypes = [torch.bfloat16, torch.float8_e5m2, torch.int8]
    if target != TARGETS["sm_80"]:
        dtypes.append(torch.float8_e4m3fn)
    for name in itertools.chain(launches(), write_launches(dtypes)):
        binary = compiled.pop()
        assembly = binary.asm.get("ptx") or binary.asm["amdgcn"]
        yield {"name": name, "shared": binary.metadata.shared, "assembly": assembly}


def launches() -> Iterator[str]:
    """Launch every kernel over a grid of dtypes and shapes; yield the name of each launch."""
    for dtype in (torch.float32, torch.bfloat16):
        for heads, size, value_size in ((8, 128, 128), (13, 46, 46), (1, 256, 256), (2, 96, 64)):
            name = f"{dtype} {heads} x {size} x {value_size}"
            kv = torch.empty(7, heads, size + value_size, dtype=dtype, device="meta")
            kv = kv.split((size, value_size), -1)
            caches = [
                torch.empty(9, 16, heads, d, dtype=dtype, device="meta") for d in (size, value_size)
            ]
            slots = torch.empty(7, dtype=torch.int64, device="meta")
            run(reshape_and_cache.prepare(*kv, *caches, slots))
            yield f"reshape_and_cache {name}"
            table = torch.empty(7, 4, dtype=torch.int32, device="meta")
            starts = torch.empty(8, dtype=torch.int32, device="meta")
            run(gather_cache.prepare(*caches, table, starts, 7, dtype=dtype))
            yield f"gather_cache {name}"
            run(copy_blocks.prepare(*caches, table[:, :2]))
            yield f"copy_blocks {name}"
            yield from rope_launches(name, kv, caches, slots)
            for tokens, form in ((7, "decode"), (700, "prefill")):
                query = torch.empty(tokens, 4 * heads, size, dtype=dtype, device="meta")
                run(paged_attention.prepare(query, *caches, table, starts[1:], starts, 0.1))
                yield f"paged_attention {form} {name}"


def rope_launches(
    name: str, kv: tuple[Tensor, ...], caches: list[Tensor], slots: Tensor
) -> Iterator[str]:
    """Launch the rotating kernels: both kinds of pairs, all of a head or not, normed or not."""
    key, value = kv
    tokens, heads, size = key.shape
    query = torch.empty(tokens, 4 * heads, size, dtype=key.dtype, device="meta")
    cos = torch.empty(99, size // 2, device="meta")
    args = (query, key, value, cos, cos, slots, *caches, slots)
    weight = torch.empty(size, dtype=key.dtype, device="meta")
    for interleaved in (False, True):
        form = "interleaved" if interleaved else "halves"
        run(rope_reshape_and_cache.prepare(*args, interleaved=interleaved))
        yield f"rope_reshape_and_cache {form} {name}"
        full = torch.empty(tokens, size - 2, dtype=key.dtype, device="meta")
        rotation = (query, key, full, full)
        run(rotary_embedding.prepare(*rotation, interleaved=interleaved, rotary_dim=size - 2))
        yield f"rotary_embedding {form} {name}"
    run(qk_norm_rope_reshape_and_cache.prepare(*args, weight, weight, 1e-6))
    yield f"qk_norm_rope_reshape_and_cache {name}"


def write_launches(dtypes: Sequence[torch.dtype]) -> Iterator[str]:
    """Launch the writing kernels into caches of `dtypes`, for few tokens and for many."""
    for dtype, tokens in itertools.product(dtypes, (7, 7000)):
        name = f"{dtype} {tokens}"

        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        key = value = empty(tokens, 8, 128, dtype=torch.bfloat16)
        slots = empty(tokens, dtype=torch.int32)
        caches = empty(9, 16, 8, 128), empty(9, 16, 8, 128)
        if dtype != torch.bfloat16:
            scale_caches = empty(2, 9, 16, 8, dtype=torch.float32)
            run(reshape_and_cache_dynamic.prepare(key, value, *caches, *scale_caches, slots))
            yield f"reshape_and_cache_dynamic {name}"
        if dtype == torch.int8:
            continue
        scale = empty(8, dtype=torch.float32)
        for form, scales in (("", ()), ("scale", (scale[0],) * 2), ("scales", (scale,) * 2)):
            run(reshape_and_cache.prepare(key, value, *caches, slots, *scales))
            yield f"reshape_and_cache {name} {form}"
        run(reshape_and_cache_packed.prepare(key, value, empty(2, 9, 16, 8, 128), slots))
        yield f"reshape_and_cache_packed {name}"
        caches = empty(9, 8, 16, 16, 8), empty(9, 8, 128, 16)
        run(reshape_and_cache_head_major.prepare(key, value, *caches, slots))
        yield f"reshape_and_cache_head_major {name}"
        rows = empty(tokens, 512, dtype=torch.bfloat16), empty(tokens, 64, dtype=torch.bfloat16)
        run(concat_and_cache_mla.prepare(*rows, empty(9, 16, 576), slots, scale[0]))
        yield f"concat_and_cache_mla {name}"


if __name__ == "__main__":
    for report in compile_launches(TARGETS[sys.argv[1]]):
        print(json.dumps(report))
