"""Compile, without a GPU, exactly what the kernels' `prepare` functions describe.

`python compile_only.py <target>` sends launches on meta tensors to Triton's compiler for the named
target and prints one JSON object a launch. It is a program of its own because tests without a GPU
import Triton in interpreter mode, where nothing can be compiled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from torch_tkv.kernels import paged_attention, reshape_and_cache
from torch_tkv.kernels.launcher import run

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
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
        elif param.is_constexpr or (arg == 1 and specialise):
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
    for name in launches():
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
            for tokens, form in ((7, "decode"), (700, "prefill")):
                query = torch.empty(tokens, 4 * heads, size, dtype=dtype, device="meta")
                run(paged_attention.prepare(query, *caches, table, starts[1:], starts, 0.1))
                yield f"paged_attention {form} {name}"


if __name__ == "__main__":
    for report in compile_launches(TARGETS[sys.argv[1]]):
        print(json.dumps(report))
