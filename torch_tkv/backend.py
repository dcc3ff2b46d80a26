"""The Dynamo backend "tkv": Inductor with the passes of torch_tkv."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


def tkv(
    gm: torch.nn.Module,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph with Inductor and the passes of torch_tkv: `torch.compile(backend="tkv")`.

    Args:
        gm: the graph, from Dynamo.
        example_inputs: its fake inputs.
        mode: as for Inductor: "default", "reduce-overhead", "max-autotune", ...
        options: as for Inductor; see `inductor_options`.
    """
    from torch_tkv.passes.inductor import compile_graph

    return compile_graph(gm, example_inputs, inductor_options(options, mode=mode))


def inductor_options(
    options: Mapping[str, Any] | None = None, *, mode: str | None = None
) -> dict[str, Any]:
    """Return the options that make Inductor run the passes: `torch.compile(options=...)`.

    Args:
        options: other options of Inductor. A post_grad_custom_post_pass among them, else the one in
            `torch._inductor.config`, runs before ours, on a graph without in-place operators.
        mode: a mode of Inductor, since torch.compile takes no mode beside options; options win.

    Raises:
        RuntimeError: Inductor does not know the mode or an option.
    """
    # Here and not above: they load Inductor, which `import torch_tkv` must not.
    from torch_tkv.passes.cache_write import CacheWrite
    from torch_tkv.passes.inductor import configured_passes, validated

    checked = validated(mode, options)
    return checked | {"post_grad_custom_post_pass": CacheWrite(configured_passes(checked))}
