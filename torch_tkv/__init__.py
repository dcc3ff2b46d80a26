"""torch_tkv: the KV-cache layer for torch.compile.

`import torch_tkv` registers `torch.ops.tkv.*` and nothing else: Triton is loaded by the first
launch of a kernel, Inductor by the first compilation.
"""

from torch_tkv.backend import explain, inductor_options
from torch_tkv.block_allocator import BlockAllocator, OutOfBlocks, PagedSequence
from torch_tkv.cuda_graphs import GraphLadder
from torch_tkv.ops import (
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
from torch_tkv.paged_batch import BatchIndices, PagedBatch
from torch_tkv.paged_kv_cache import LayerCache, PagedKVCache
from torch_tkv.passes.report import Report, report

__all__ = [
    "BatchIndices",
    "BlockAllocator",
    "GraphLadder",
    "LayerCache",
    "OutOfBlocks",
    "PagedBatch",
    "PagedKVCache",
    "PagedSequence",
    "Report",
    "concat_and_cache_mla",
    "copy_blocks",
    "explain",
    "gather_cache",
    "inductor_options",
    "merge_attention_states",
    "paged_attention",
    "paged_attention_lse",
    "qk_norm_rope_reshape_and_cache",
    "report",
    "reshape_and_cache",
    "reshape_and_cache_dynamic",
    "reshape_and_cache_head_major",
    "reshape_and_cache_packed",
    "rope_reshape_and_cache",
    "rotary_embedding",
]
