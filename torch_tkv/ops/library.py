"""The `tkv` operator library: an operator is its schema, its checks and a stem.

The stem names the rest: `torch_tkv.reference.<stem>` runs on CPU tensors, what the `prepare` of
`torch_tkv.kernels.<stem>` describes is launched on CUDA and ROCm tensors.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

from torch_tkv import reference
from torch_tkv.kernels.launcher import Launcher
from torch_tkv.ops.checks import refuse_autograd

# A Library deregisters its operators when it is collected: this reference keeps them alive.
_LIBRARY = torch.library.Library("tkv", "FRAGMENT")

# needs_fixed_stride_order: the kernels take strides, but a pass places operators without the eager
# strides that Inductor's default (exact strides) would need to hold on to.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def define(
    schema: str,
    *,
    check: Callable[..., None],
    check_indices: Callable[..., None],
    fake: Callable[..., Any] | None = None,
) -> None:
    """Declare `tkv::<schema>` and hook its CPU, CUDA and fake implementations.

    Args:
        schema: stem and arguments, with every mutation declared.
        check: raises for shapes, dtypes, strides and devices that do not fit; runs everywhere, on a
            GPU once for all calls that agree in these.
        check_indices: raises for indices out of range; runs on CPU, where values can be read.
        fake: returns outputs of the right shape and dtype for fake tensors; None where there are
            none.
    """
    stem = schema.partition("(")[0]
    run_reference = getattr(reference, stem)

    def check_all(*args: Any, **kwargs: Any) -> None:
        refuse_autograd(stem, args)
        check(*args, **kwargs)

    def prepare(*args: Any, **kwargs: Any) -> Any:
        # Imported by the first call, because importing torch_tkv loads no Triton.
        kernels = importlib.import_module(f"torch_tkv.kernels.{stem}")
        return kernels.prepare(*args, **kwargs)

    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        check_all(*args, **kwargs)
        check_indices(*args, **kwargs)
        return run_reference(*args, **kwargs)

    def on_fake(*args: Any, **kwargs: Any) -> Any:
        check_all(*args, **kwargs)
        mutated = [args[i].untyped_storage()._cdata for i in mutable]
        if len(set(mutated)) < len(mutated) and not _has_passes():
            _warn_of_shared_storage(stem)
        return fake(*args, **kwargs) if fake is not None else None

    # define and impl cost 2 us a call, torch.library.custom_op 11 us (torch 2.11, empty body, CPU).
    _LIBRARY.define(schema, tags=_TAGS)
    arguments = getattr(torch.ops.tkv, stem).default._schema.arguments
    mutable = [i for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]
    _LIBRARY.impl(stem, on_cpu, "CPU")
    launcher = Launcher(prepare, check_all)
    # The method and not the object, whose call Python looks up each time.
    _LIBRARY.impl(stem, launcher.__call__, "CUDA")
    torch.library.register_fake(f"tkv::{stem}", on_fake, lib=_LIBRARY)


def _has_passes() -> bool:
    """Whether what is compiled now goes through the passes of torch_tkv, which make it right."""
    dynamo: Any = sys.modules.get("torch._dynamo.symbolic_convert")
    try:
        backend = dynamo.InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:  # nothing is compiled by Dynamo
        return False
    options = getattr(backend, "config", None)  # of the backend "inductor"
    custom = options.get("post_grad_custom_post_pass") if isinstance(options, dict) else None
    backend = getattr(backend, "compiler_fn", backend)  # torch.compile wraps other ones
    modules = type(custom).__module__, str(getattr(backend, "__module__", ""))
    return any(module.startswith("torch_tkv.") for module in modules)


@functools.cache
def _warn_of_shared_storage(stem: str) -> None:
    """Say once that a compiled call is one of those that torch.compile gets wrong."""
    warnings.warn(
        f"{stem}: two tensors that it mutates share a storage. torch.compile may copy that storage "
        "at every call, and up to torch 2.15 it may write to the wrong rows. Compile with "
        'backend="tkv", which writes in place, or give K and V storages of their own, or hand the '
        "whole tensor to tkv::reshape_and_cache_packed",
        stacklevel=2,
    )
