"""Write the latent and rope parts of MLA side by side: tkv::reshape_and_cache of one head."""

from __future__ import annotations

from torch import Tensor

from torch_tkv.kernels.launcher import Launch
from torch_tkv.kernels.reshape_and_cache import Cache, prepare_write


def prepare(
    kv_c: Tensor,
    k_pe: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    scale: Tensor | None = None,
    *,
    wrap: bool = False,
) -> Launch:
    """Describe the launch of a write; arguments as in `torch_tkv.concat_and_cache_mla`."""
    latent, rope = kv_c.unsqueeze(1), k_pe.unsqueeze(1)
    views = kv_cache[:, :, None].split((kv_c.shape[1], k_pe.shape[1]), -1)
    keys, values = (Cache(kv_cache, view) for view in views)
    launch = prepare_write(latent, rope, keys, values, slot_mapping, scale, scale, wrap)
    # A launch is repeated with the pointers of the operator's own arguments.
    return launch._replace(tensors=(kv_c, k_pe, *launch.tensors[2:]))
