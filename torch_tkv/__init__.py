"""torch_tkv: the KV-cache layer for torch.compile.

`import torch_tkv` registers `torch.ops.tkv.*` and nothing else: Triton is loaded by the first
launch of a kernel, Inductor by the first compilation.
"""

from torch_tkv.ops import paged_attention, reshape_and_cache

__all__ = ["paged_attention", "reshape_and_cache"]
