"""Attention of ragged queries over a paged cache: softmax(scale * q k^T + mask) v.

T query tokens of B sequences, Hq query heads in groups of G = Hq / Hkv to a KV head, head sizes D
(key) and Dv (value), N blocks of P slots. The G heads of a group are packed into the rows of a tile
of queries, so that K and V are read once a group.

Sequences of few new tokens are decoded: their tiles of keys are dealt out evenly to workers
(Stream-K; Osama et al., 2023), whose partial results a second kernel merges. Longer ones are
prefilled: a program takes a tile of queries to all its keys.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_tkv.kernels.attention_geometry import (
    SIZES,
    Batch,
    Cache,
    Options,
    Plan,
    full_query_tiles,
    query_tiles,
    sequence_of,
)
from torch_tkv.kernels.attention_plans import parts, plan_decode, plan_merge, plan_prefill
from torch_tkv.kernels.attention_result import Result, store_result
from torch_tkv.kernels.attention_tiles import Inputs, attend_tile
from torch_tkv.kernels.cache_tiles import SATURATES_AT
from torch_tkv.kernels.device import Device, device_of
from torch_tkv.kernels.launcher import Launch
from torch_tkv.kernels.paged_decode import paged_decode, paged_merge
from torch_tkv.kernels.tile_list import FIELDS, list_tiles


@triton.jit(do_not_specialize=SIZES)
def _prefill(
    out,  # [T, Hq, Dv]
    lse_out,  # None or [T, Hq]
    query,  # [T, Hq, D]
    query_stride_t,
    query_stride_h,
    keys,
    values,
    batch,
    extra,
    scale,
    output_scale,  # None or []
    num_seqs,  # B
    num_tokens,  # T
    num_blocks,  # N
    max_blocks,
    SATURATES: tl.constexpr,
    plan: tl.constexpr,
):
    kv_head = tl.program_id(0)
    # The last tiles of a long sequence see the most keys: they come first.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    lanes, max_keys = tl.arange(0, plan.block_b), max_blocks * plan.page
    number, seq = sequence_of(tile, lanes, batch, num_seqs, num_tokens, max_keys, plan)
    query_tile = tile - (full_query_tiles(seq.start, plan) + number)
    if (query_tile >= query_tiles(seq.count, plan)) | (query_tile < 0):
        return
    if plan.max_queries is not None:  # noqa: SIM102, the decoding part has the rest
        if (seq.count <= plan.max_queries) | (seq.length == 0):
            return
    strides = (query_stride_t, query_stride_h)
    inputs = Inputs(query, *strides, keys, values, batch, extra, scale, num_blocks)
    rows, highest, total, acc = attend_tile(
        inputs, seq, number, query_tile, 0, 0, kv_head, True, plan
    )
    num_heads = tl.num_programs(0) * plan.group
    store_result(
        Result(out, lse_out, values, extra.sinks, output_scale, num_heads),
        acc,
        highest[:, None],
        total[:, None],
        rows.token[:, None],
        rows.head[:, None],
        tl.arange(0, plan.block_dv)[None, :],
        rows.inside[:, None],
        kv_head,
        SATURATES,
        plan,
    )


def prepare(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_scale_cache: Tensor | None = None,
    v_scale_cache: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    query_bias: Tensor | None = None,
    output_scale: Tensor | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    with_lse: bool = False,
) -> Launch:
    """Describe the launches of attention; arguments as in `torch_tkv.paged_attention`."""
    tokens, heads, size = query.shape
    _, page, kv_heads, value_size = value_cache.shape
    device = device_of(query.device)
    base = Plan(
        page=page,
        group=heads // kv_heads,
        size=size,
        value_size=value_size,
        key_strides=key_cache.stride()[:3],
        value_strides=value_cache.stride()[:3],
        causal=causal,
        window=window,
        softcap=softcap,
        block_d=max(triton.next_power_of_2(size), 16),
        block_dv=max(triton.next_power_of_2(value_size), 16),
        pairs=_pairs((key_cache, value_cache), query, device),
    )
    dtype = query.dtype if output_scale is None else torch.float8_e4m3fn
    out = query.new_empty(tokens, heads, value_size, dtype=dtype)
    lse = query.new_empty(tokens, heads, dtype=torch.float32) if with_lse else None
    bias_sizes = (0, 0, 0) if query_bias is None else (*query_bias.stride(), query_bias.shape[1])
    attention = _Attention(
        out,
        lse,
        query,
        _cache(key_cache, k_scale, k_scale_cache),
        _cache(value_cache, v_scale, v_scale_cache),
        Batch(
            block_table,
            block_table.stride(0),
            block_table.stride(1),
            seq_lens,
            seq_lens.stride(0),
            query_start_loc,
            query_start_loc.stride(0),
        ),
        Options(alibi_slopes, sinks, query_bias, *bias_sizes),
        scale,
        output_scale,
    )
    decode, prefill = parts(tokens, seq_lens.shape[0])
    launch = attention.prefill(base, device) if prefill else None
    if decode:
        launch = attention.decode(base, device, launch)
    assert launch is not None
    return launch._replace(out=out if lse is None else (out, lse))


class _Attention(NamedTuple):
    """The arguments of a call, as the kernels take them."""

    out: Tensor
    lse: Tensor | None
    query: Tensor
    keys: Cache
    values: Cache
    batch: Batch
    extra: Options
    scale: float
    output_scale: Tensor | None

    @property
    def sizes(self) -> dict[str, int]:
        return {"tokens": self.query.shape[0], "seqs": self.batch.block_table.shape[0]}

    @property
    def tensors(self) -> tuple[Any, ...]:
        """The arguments that both kernels of attention take, behind `out`, `lse` and scratch."""
        strides = self.query.stride()[:2]
        caches = (self.keys, self.values)
        rest = (self.batch, self.extra, self.scale, self.output_scale)
        return (self.query, *strides, *caches, *rest)

    @property
    def limits(self) -> tuple[int, int, int, int]:
        seqs, max_blocks = self.batch.block_table.shape
        return (seqs, self.query.shape[0], self.keys.data.shape[0], max_blocks)

    @property
    def saturates(self) -> float | None:
        return SATURATES_AT.get(self.out.dtype)

    def prefill(self, base: Plan, device: Device) -> Launch:
        hopper = self._hopper(base, device)
        bits = 8 * max(self.query.element_size(), self.keys.data.element_size())
        caches = (self.keys.data, self.values.data)
        base = base._replace(converts=hopper is not None and caches[0].element_size() == 1)
        config = plan_prefill(base, device, **self.sizes, bits=bits, hopper=hopper is not None)
        plan, num_warps, num_stages = config
        seqs, tokens, _, max_blocks = self.limits
        tiles = tokens * plan.group // plan.tile_rows + seqs + 1
        kv_heads = self.keys.data.shape[2]
        options = {"num_warps": num_warps, "num_stages": num_stages}
        if hopper is None:
            return Launch(
                _prefill,
                (kv_heads, tiles),
                (self.out, self.lse, *self.tensors),
                self.limits,
                (self.saturates, plan),
                options,
            )
        listed = self.query.new_empty((tiles + 1) * FIELDS.value, dtype=torch.int32)
        boxes = [hopper.boxes_of(cache, plan) for cache in caches]
        attend = Launch(
            hopper.hopper_prefill,
            (min(device.processors, tiles * kv_heads),),
            (self.out, self.lse, listed, *boxes, *self.tensors),
            (*self.limits, kv_heads, tiles),
            (self.saturates, plan),
            options | {"launch_pdl": True},
        )
        return Launch(
            list_tiles,
            (tiles,),
            (listed, self.batch),
            (seqs, tokens, max_blocks),
            (plan,),
            {"num_warps": 4, "launch_pdl": plan.max_queries is not None},
            then=attend,
        )

    def _hopper(self, base: Plan, device: Device) -> ModuleType | None:
        """Return the module of the prefilling kernel for Hopper where it can do this."""
        caches = (self.keys.data, self.values.data)
        together = 16 // caches[0].element_size()  # elements that are fetched as one
        able = (
            device.arch == 90
            and triton.__version__.startswith(_GLUON_TRITONS)
            and base.size == base.value_size
            and 64 <= base.block_d <= 256
            and base.size % together == 0
            and self.extra.slopes is None
            and self.extra.bias is None
            and self.query.element_size() == 2
            # A block is fetched in boxes of 8 rows or more, a power of 2, with aligned rows.
            and base.page in (8, 16, 32, 64, 128, 256)
            and all(cache.data_ptr() % 16 == 0 and min(cache.shape) > 0 for cache in caches)
            and all(stride % together == 0 for cache in caches for stride in cache.stride()[:3])
        )
        return importlib.import_module("torch_tkv.kernels.hopper_prefill") if able else None

    def decode(self, base: Plan, device: Device, then: Launch | None) -> Launch:
        kv_heads = self.keys.data.shape[2]
        bits = 32 if self.query.element_size() == 4 else 8 * self.keys.data.element_size()
        max_keys = self.batch.block_table.shape[1] * base.page
        plan, num_warps, num_stages = plan_decode(
            base, device, **self.sizes, kv_heads=kv_heads, bits=bits, max_keys=max_keys
        )
        numel = 2 * plan.workers * kv_heads * plan.tile_rows * (plan.value_size + 1)
        partial = self.query.new_empty(numel, dtype=torch.float32)
        pdl = {"launch_pdl": True} if plan.pdl else {}
        how = plan_merge(plan, **self.sizes)
        used = min(plan.tile_rows, self.sizes["tokens"] * plan.group)  # rows of a tile, at most
        merge = Launch(
            paged_merge,
            (kv_heads * triton.cdiv(used, how.rows), how.programs),
            (
                self.out,
                self.lse,
                partial,
                self.values,
                self.batch,
                self.extra.sinks,
                self.output_scale,
            ),
            (*self.limits[:2], self.limits[3], kv_heads),
            (self.saturates, how.by_unit, how.rows, how.ahead, plan),
            {"num_warps": how.num_warps} | pdl,
            then=then,
        )
        return Launch(
            paged_decode,
            (kv_heads, plan.workers),
            (self.out, self.lse, partial, *self.tensors),
            self.limits,
            (self.saturates, plan),
            {"num_warps": num_warps, "num_stages": num_stages},
            then=merge,
        )


# Gluon, in which the prefilling kernel for Hopper is written, is experimental.
_GLUON_TRITONS = ("3.6.", "3.7.", "3.8.", "3.9.")

_PAIRS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5"}


def _pairs(caches: tuple[Tensor, Tensor], query: Tensor, device: Device) -> str | None:
    """Return how 8-bit caches are read in pairs, None if not; see Note [Pairs of elements]."""
    even = all(n % 2 == 0 for x in caches for n in (*x.stride()[:3], x.shape[3], x.data_ptr()))
    if not even or device.arch < 80 or query.dtype == torch.float32:
        return None
    return _PAIRS.get(caches[0].dtype)


def _cache(data: Tensor, scale: Tensor | None, scales: Tensor | None) -> Cache:
    scale_stride = scale.stride(0) if scale is not None and scale.dim() else 0
    strides = (0, 0, 0) if scales is None else scales.stride()
    return Cache(data, scale, scale_stride, scales, *strides)
