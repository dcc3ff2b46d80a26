"""The operators in plain PyTorch: specification, CPU implementation and oracle of the tests."""

from torch_tkv.reference.paged_attention import paged_attention
from torch_tkv.reference.reshape_and_cache import reshape_and_cache

__all__ = ["paged_attention", "reshape_and_cache"]
