"""The operators in plain PyTorch: specification, CPU implementation and oracle of the tests."""

from torch_tkv.reference.concat_and_cache_mla import concat_and_cache_mla
from torch_tkv.reference.copy_blocks import copy_blocks
from torch_tkv.reference.gather_cache import gather_cache
from torch_tkv.reference.merge_attention_states import merge_attention_states
from torch_tkv.reference.paged_attention import paged_attention
from torch_tkv.reference.paged_attention_lse import paged_attention_lse
from torch_tkv.reference.qk_norm_rope_reshape_and_cache import qk_norm_rope_reshape_and_cache
from torch_tkv.reference.reshape_and_cache import reshape_and_cache
from torch_tkv.reference.reshape_and_cache_dynamic import reshape_and_cache_dynamic
from torch_tkv.reference.reshape_and_cache_head_major import reshape_and_cache_head_major
from torch_tkv.reference.reshape_and_cache_packed import reshape_and_cache_packed
from torch_tkv.reference.rope_reshape_and_cache import rope_reshape_and_cache
from torch_tkv.reference.rotary_embedding import rotary_embedding

__all__ = [
    "concat_and_cache_mla",
    "copy_blocks",
    "gather_cache",
    "merge_attention_states",
    "paged_attention",
    "paged_attention_lse",
    "qk_norm_rope_reshape_and_cache",
    "reshape_and_cache",
    "reshape_and_cache_dynamic",
    "reshape_and_cache_head_major",
    "reshape_and_cache_packed",
    "rope_reshape_and_cache",
    "rotary_embedding",
]
