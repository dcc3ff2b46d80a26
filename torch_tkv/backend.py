"""The Dynamo backend "tkv": Inductor with the passes of torch_tkv."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from torch_tkv.passes.report import Report, findings, report

_PADDING = ("wrap", "skip")


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
        options: as for Inductor, and "tkv.padding"; see `inductor_options`.
    """
    from torch_tkv.passes.inductor import compile_graph

    return compile_graph(gm, example_inputs, inductor_options(options, mode=mode))


def inductor_options(
    options: Mapping[str, Any] | None = None, *, mode: str | None = None
) -> dict[str, Any]:
    """Return the options that make Inductor run the passes: `torch.compile(options=...)`.

    Args:
        options: other options of Inductor. A post_grad_custom_post_pass among them, else the one in
            `torch._inductor.config`, runs before ours, on a graph without in-place operators. Two
            options are ours. "tkv.padding" is "wrap", where eager writes keep their meaning that
            negative indices count from the end of the cache, or "skip", where nothing is written
            for these, as by the operators of torch_tkv. "tkv.rope" is whether rotary embeddings and
            QK norms are fused with the writes, True unless it is given.
        mode: a mode of Inductor, since torch.compile takes no mode beside options; options win.

    Raises:
        RuntimeError: Inductor does not know the mode or an option.
        ValueError: "tkv.padding" is neither "wrap" nor "skip", or "tkv.rope" is no bool.
    """
    # Here and not above: they load Inductor, which `import torch_tkv` must not.
    from torch_tkv.passes.inductor import configured_passes, validated
    from torch_tkv.passes.pipeline import Pipeline

    others = dict(options or {})
    padding = others.pop("tkv.padding", "wrap")
    if padding not in _PADDING:
        raise ValueError(
            f'inductor_options: option "tkv.padding" must be "wrap" or "skip", got {padding!r}'
        )
    rope = others.pop("tkv.rope", True)
    if not isinstance(rope, bool):
        raise ValueError(f'inductor_options: option "tkv.rope" must be True or False, got {rope!r}')
    checked = validated(mode, others)
    ours = Pipeline(configured_passes(checked), padding=padding, rope=rope)
    return checked | {"post_grad_custom_post_pass": ours}


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Compile a function or module for some arguments and report on its cache writes.

    It is compiled by backend "tkv" as if for the first time and called once, so it writes to its
    caches. Call it where the model is called: under `torch.no_grad()`, for inference.

    Args:
        function: what to compile; torch.compile's result is compiled again from what it wraps.
        args: its arguments.
        kwargs: its keyword arguments.

    Returns:
        The report of the graphs that were compiled for this call, and of no others.
    """

    def backend(gm: torch.nn.Module, inputs: Sequence[Any]) -> Callable[..., Any]:
        return tkv(gm, inputs)  # a function of its own: Dynamo has no code for it yet

    for wrapper in ("_orig_mod", "_torchdynamo_orig_callable"):
        function = getattr(function, wrapper, function)
    before = findings()
    torch.compile(function, backend=backend)(*args, **kwargs)
    return report(since=before)
