"""The operators `torch.ops.tkv.*`; importing this package registers them."""

from torch_tkv.ops.paged_attention import paged_attention
from torch_tkv.ops.reshape_and_cache import reshape_and_cache

__all__ = ["paged_attention", "reshape_and_cache"]
