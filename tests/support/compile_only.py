"""Compile, without a GPU, exactly what the kernels' `prepare` functions describe.

`python compile_only.py <target>` sends launches on meta tensors to Triton's compiler for the named
target and prints a JSON object for each kernel launched. It is a program of its own because tests
without a GPU import Triton in interpreter mode, where nothing can be compiled.
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
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction

from torch_tkv.kernels import (
    concat_and_cache_mla,
    copy_blocks,
    gather_cache,
    merge_attention_states,
    paged_attention,
    paged_attention_lse,
    qk_norm_rope_reshape_and_cache,
    reshape_and_cache,
    reshape_and_cache_dynamic,
    reshape_and_cache_head_major,
    reshape_and_cache_packed,
    rope_reshape_and_cache,
    rotary_embedding,
)
from torch_tkv.kernels.device import Device
from torch_tkv.kernels.launcher import run

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), Device(80, 108)),
    "sm_90": (GPUTarget("cuda", 90, 32), Device(90, 132)),
    "sm_100": (GPUTarget("cuda", 100, 32), Device(100, 148)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Device(0, 304)),
    "gfx950": (GPUTarget("hip", "gfx950", 64), Device(0, 256)),
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
    constants, attrs = {}, {}

    def type_of(path: tuple[int, ...], arg: Any, constexpr: bool, specialise: bool) -> Any:
        if isinstance(arg, tuple) and not constexpr:
            types = [type_of((*path, i), x, False, specialise) for i, x in enumerate(arg)]
            return type(arg)(*types) if hasattr(arg, "_fields") else tuple(types)
        if hasattr(arg, "block_shape"):  # a tensor descriptor
            element = POINTERS[arg.base.dtype].removeprefix("*")
            return f"tensordesc<{element}{list(arg.block_shape)},{arg.layout!r}>"
        is_int = isinstance(arg, int)
        fixed = constexpr or arg is None or isinstance(arg, triton.language.constexpr)
        if fixed or (is_int and arg == 1 and specialise):
            constants[path] = arg
            return "constexpr"
        if isinstance(arg, Tensor) or (is_int and arg % 16 == 0 and specialise):
            attrs[path] = [["tt.divisibility", 16]]
        if isinstance(arg, Tensor):
            return POINTERS[arg.dtype]
        return "i32" if is_int else "fp32"

    signature = {
        param.name: type_of((i,), arg, param.is_constexpr, not param.do_not_specialize)
        for i, (param, arg) in enumerate(zip(kernel.params, args, strict=True))
    }
    make = GluonASTSource if kernel.is_gluon() else ASTSource
    return make(kernel, signature, constants, attrs)


def compile_launches(target: GPUTarget, device: Device) -> Iterator[dict[str, Any]]:
    """Yield what the compiler says of every launch of `launches()`."""
    compiled = []
    for module in (paged_attention, rope_reshape_and_cache):
        module.device_of = lambda _: device

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append(triton.compile(source_of(kernel, args), target=target, options=options))

    JITFunction.run = run
    dtypes = [torch.bfloat16, torch.float8_e5m2, torch.int8]
    if target.arch != 80:
        dtypes.append(torch.float8_e4m3fn)
    for name in itertools.chain(launches(), attention_launches(dtypes), cache_launches(dtypes)):
        for binary in compiled:
            assembly = binary.asm.get("ptx") or binary.asm["amdgcn"]
            shared = binary.metadata.shared
            yield {"name": name, "kernel": binary.name, "shared": shared, "assembly": assembly}
        compiled.clear()


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
            lse = torch.empty(7, heads, device="meta")
            run(merge_attention_states.prepare(kv[1], lse, kv[1], lse))
            yield f"merge_attention_states {name}"
            yield from rope_launches(name, kv, caches, slots)


def attention_launches(dtypes: Sequence[torch.dtype]) -> Iterator[str]:
    """Launch attention: few tokens with all options, many in every form, caches of 8 bits."""
    table = torch.empty(7, 99, dtype=torch.int32, device="meta")
    starts = torch.empty(8, dtype=torch.int32, device="meta")

    def arguments(
        tokens: int,
        heads: int,
        sizes: tuple[int, int],
        dtype: torch.dtype,
        cache: torch.dtype,
        seqs: int = 7,
    ) -> tuple[Any, ...]:
        caches = [torch.empty(9, 16, heads, d, dtype=cache, device="meta") for d in sizes]
        query = torch.empty(tokens, 4 * heads, sizes[0], dtype=dtype, device="meta")
        return (query, *caches, table[:seqs], starts[1 : seqs + 1], starts[: seqs + 1], 0.1)

    half, heads = torch.bfloat16, torch.empty(4 * 13, device="meta")
    options = {"alibi_slopes": heads, "sinks": heads, "window": 99, "softcap": 20.0}
    options["query_bias"] = torch.empty(7, 3, device="meta")
    run(paged_attention_lse.prepare(*arguments(7, 13, (46, 46), half, half), **options))
    yield "paged_attention_lse all options"
    for heads, sizes, dtype in (
        (8, (128, 128), half),
        (8, (64, 64), half),
        (2, (80, 80), half),
        (2, (96, 64), half),
        (1, (256, 256), half),
        (1, (256, 256), torch.float32),
    ):
        run(paged_attention.prepare(*arguments(700, heads, sizes, dtype, dtype)))
        yield f"paged_attention {heads} x {sizes} {dtype}"
    scale = torch.empty(8, device="meta")
    options = {"window": 99, "softcap": 20.0, "sinks": torch.empty(32, device="meta")}
    if torch.float8_e4m3fn in dtypes:
        options["output_scale"] = scale[0]
    run(paged_attention.prepare(*arguments(700, 8, (128, 128), half, half), **options))
    yield "paged_attention many tokens, many options"
    for dtype in set(dtypes) - {half}:
        scales = {"k_scale": scale, "v_scale": scale}
        if dtype == torch.int8:
            scale_cache = torch.empty(9, 16, 8, device="meta")
            scales = {"k_scale_cache": scale_cache, "v_scale_cache": scale_cache}
        for size in (128, 16) if dtype == torch.int8 else (128,):
            sizes = (size, size)
            run(paged_attention.prepare(*arguments(7, 8, sizes, half, dtype), **scales))
            yield f"paged_attention {size} {dtype}"
        for size in (128, 256) if dtype == torch.int8 else (128,):
            sizes = (size, size)
            prompt = arguments(700, 8, sizes, half, dtype, seqs=1)
            run(paged_attention.prepare(*prompt, **scales))
            yield f"paged_attention many tokens {size} {dtype}"


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
    if heads == 8:
        query, key, value, slots = (x.repeat_interleave(999, 0) for x in (query, key, value, slots))
        args = (query, key, value, cos, cos, slots, *caches, slots)
        run(qk_norm_rope_reshape_and_cache.prepare(*args, weight, weight, 1e-6))
        yield f"qk_norm_rope_reshape_and_cache many tokens {name}"
        for interleaved in (False, True):
            run(rope_reshape_and_cache.prepare(*args, interleaved=interleaved))
            yield f"rope_reshape_and_cache many tokens {name}"


def cache_launches(dtypes: Sequence[torch.dtype]) -> Iterator[str]:
    """Launch the kernels of caches of `dtypes`, for few tokens and for many."""
    for dtype, tokens in itertools.product(dtypes, (7, 7000)):
        name = f"{dtype} {tokens}"

        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        key = value = empty(tokens, 8, 128, dtype=torch.bfloat16)
        slots = empty(tokens, dtype=torch.int32)
        caches = empty(9, 16, 8, 128), empty(9, 16, 8, 128)
        run(copy_blocks.prepare(*caches, slots.new_empty(tokens, 2)))
        yield f"copy_blocks {name}"
        if dtype != torch.bfloat16:
            scale_caches = empty(2, 9, 16, 8, dtype=torch.float32)
            run(reshape_and_cache_dynamic.prepare(key, value, *caches, *scale_caches, slots))
            yield f"reshape_and_cache_dynamic {name}"
        if dtype == torch.int8:
            continue
        scale = empty(8, dtype=torch.float32)
        table, starts = slots.new_empty(7, 4), slots.new_empty(8)
        for form, scales in (("", ()), ("scales", (scale, scale))):
            launch = gather_cache.prepare(
                *caches, table, starts, tokens, *scales, dtype=torch.bfloat16
            )
            run(launch)
            yield f"gather_cache {name} {form}"
        for form, scales in (("", ()), ("scale", (scale[0],) * 2), ("scales", (scale,) * 2)):
            run(reshape_and_cache.prepare(key, value, *caches, slots, *scales))
            yield f"reshape_and_cache {name} {form}"
        run(reshape_and_cache_packed.prepare(key, value, empty(2, 9, 16, 8, 128), slots))
        yield f"reshape_and_cache_packed {name}"
        for value_size in (128, 46):
            caches = empty(9, 8, 16, 16, 8), empty(9, 8, value_size, 16)
            narrow = value[..., :value_size]
            run(reshape_and_cache_head_major.prepare(key, narrow, *caches, slots))
            yield f"reshape_and_cache_head_major {name} {value_size}"
        rows = empty(tokens, 512, dtype=torch.bfloat16), empty(tokens, 64, dtype=torch.bfloat16)
        run(concat_and_cache_mla.prepare(*rows, empty(9, 16, 576), slots, scale[0]))
        yield f"concat_and_cache_mla {name}"


if __name__ == "__main__":
    for report in compile_launches(*TARGETS[sys.argv[1]]):
        print(json.dumps(report))
