"""torch_tkv: the KV-cache layer for torch.compile.

`import torch_tkv` registers `torch.ops.tkv.*` and nothing else: Triton is loaded by the first
launch of a kernel, Inductor by the first compilation.
"""

from torch_tkv.backend import inductor_options
from torch_tkv.ops import (
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
from torch_tkv.passes.report import Report, report

__all__ = [
    "Report",
    "concat_and_cache_mla",
    "copy_blocks",
    "gather_cache",
    "inductor_options",
    "paged_attention",
    "qk_norm_rope_reshape_and_cache",
    "report",
    "reshape_and_cache",
    "reshape_and_cache_dynamic",
    "reshape_and_cache_head_major",
    "reshape_and_cache_packed",
    "rope_reshape_and_cache",
    "rotary_embedding",
]
