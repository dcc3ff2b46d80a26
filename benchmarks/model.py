"""A whole model of Transformers with random weights: decode steps and prefills.

`python benchmarks/model.py --csv model.csv --plot model.png`

The limit of a decode step is the time in which the GPU, as fast as it copies, reads what every step
must read: all weights but an embedding table of its own, and the keys and values of the context.
Caches are filled with random numbers, and every variant's first logits are compared with those of
the model's own attention over a `DynamicCache`. Prompts are computed uncompiled, as Transformers
does. On a CPU, `--device cpu --model tiny --rows 2x24x64` runs the same code.
"""

from __future__ import annotations

import argparse
import functools
import gc
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import harness
import torch
from tabulate import tabulate
from torch import Tensor

# What the configurations of Transformers are called, and the sizes of the models named.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-8b": (
        "LlamaConfig",
        {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "head_dim": 128}
        | {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"max_position_embeddings": 131072, "tie_word_embeddings": False},
    ),
    "qwen3-8b": (
        "Qwen3Config",
        {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "head_dim": 128}
        | {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"max_position_embeddings": 40960, "tie_word_embeddings": False},
    ),
    "gemma2-9b": (
        "Gemma2Config",
        {"vocab_size": 256000, "hidden_size": 3584, "intermediate_size": 14336, "head_dim": 256}
        | {"num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8}
        | {"max_position_embeddings": 32768, "sliding_window": 4096},
    ),
    "tiny": (
        "Gemma2Config",
        {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16}
        | {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        | {"sliding_window": 16, "query_pre_attn_scalar": 16},
    ),
}
GRID = ("1x1024x2048", "1x16384x17408", "16x4096x4608", "64x2048x2304")
PHASES = ("decode", "prefill")
# Of the logits' norm: each way to compute rounds differently, layer after layer.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
WARMUP = 4  # Inductor compiles, records and replays
BLOCKS = 5  # of steps, of whose means the median is reported
MATRIX_PRODUCT = re.compile("gemm|gemv|cutlass|cublas|nvjet|xmma|_mm", re.IGNORECASE)


class Size(NamedTuple):
    """What a row of the tables measures."""

    batch: int
    context: int  # tokens in the cache before a step, or of a prompt
    capacity: int  # tokens that the cache has room for

    @classmethod
    def parse(cls, text: str) -> Size:
        return cls(*map(int, text.split("x")))

    def __str__(self) -> str:
        return f"{self.batch} x {self.context} ({self.capacity})"


class Variant(NamedTuple):
    """A cache, an attention, and a backend of torch.compile, None for none."""

    cache: str
    attention: str  # "own" is the fastest that Transformers has for the model, on its own
    backend: str | None


VARIANTS = {
    "eager": Variant("dynamic", "own", None),
    "static": Variant("static", "own", "inductor"),
    "static, tkv backend": Variant("static", "own", "tkv"),
    "static, tkv attention": Variant("static", "tkv", "tkv"),
    "paged": Variant("paged", "tkv", "tkv"),
}


class Row(NamedTuple):
    """A measurement, as in a CSV file."""

    model: str
    phase: str
    batch: int
    context: int
    capacity: int
    variant: str
    ms: float
    tokens_per_s: float
    limit_ms: float | None  # of a decode step
    share_of_limit: float | None
    kernels_per_layer: float | None
    matrix_products: float | None  # their share of the time in which some kernel ran
    peak_gb: float | None
    gpu: str
    torch: str
    triton: str
    commit: str
    date: str


def make_model(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a model with random weights, made where it will run."""
    import transformers

    config_class, sizes = MODELS[name]
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, config_class)(**sizes), dtype=dtype
        )
    return model.eval().requires_grad_(False)


def set_attention(model: Any, attention: str) -> None:
    """Let the model run with "tkv" or with what Transformers has for it."""
    if attention == "own":
        softcap = getattr(model.config, "attn_logit_softcapping", None)
        attention = "sdpa" if softcap is None else "eager"
    model.set_attn_implementation(attention)


def make_cache(kind: str, model: Any, size: Size) -> Any:
    """Return an empty cache, with all of its memory where its size is fixed."""
    from transformers import DynamicCache, StaticCache

    from torch_tkv.integrations.transformers import TkvCache

    if kind == "dynamic":
        return DynamicCache(config=model.config)
    if kind == "paged":
        return TkvCache(model, size.batch, size.capacity)
    cache, config = StaticCache(model.config, max_cache_len=size.capacity), model.config
    heads = size.batch, config.num_key_value_heads, config.head_dim
    cache.early_initialization(*heads, dtype=model.dtype, device=model.device)
    return cache


def fill(cache: Any, model: Any, size: Size) -> None:
    """Write a context of random keys and values, the same into every kind of cache."""
    config = model.config
    shape = (2, size.batch, config.num_key_value_heads, size.context, config.head_dim)
    generator = torch.Generator(model.device).manual_seed(0)
    for number, layer in enumerate(cache.layers):
        keys, values = torch.randn(
            shape, generator=generator, device=model.device, dtype=model.dtype
        )
        if hasattr(cache, "paged"):
            target = cache.paged.layer(number)
            for blocks, states in ((target.key_cache, keys), (target.value_cache, values)):
                rows = blocks.flatten(0, 1).unflatten(0, (size.batch, -1))  # NHD, in order
                rows[:, : size.context] = states.transpose(1, 2)
        else:
            layer.update(keys, values)
    if hasattr(cache, "paged"):
        cache.length.fill_(size.context)


def step_bytes(model: Any, size: Size) -> int:
    """Return what a decode step must read: weights, and keys and values that are seen."""
    config, weights = model.config, sum(p.nbytes for p in model.parameters())
    if not config.tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.nbytes
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or size.context
    seen = [
        size.context if kind == "full_attention" else min(size.context, window) for kind in kinds
    ]
    row = 2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    return weights + size.batch * sum(seen) * row


def copy_gb_per_s(device: torch.device) -> float:
    """Measure the bandwidth of a copy, bytes read and written."""
    if device.type == "cuda":
        return harness.measure_ceilings(25).copy_gb_per_s
    source = torch.randn(2**24)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), 5, device) / 1e9


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(step: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Return the median, over blocks of steps, of the time of one."""
    means = []
    for _ in range(BLOCKS):
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(repeats):
            step()
        synchronize(device)
        means.append((time.perf_counter() - begin) / repeats)
    return statistics.median(means)


class Kernel(NamedTuple):
    """A kernel of a step, and when it ran."""

    name: str
    begin_us: float
    end_us: float

    @property
    def us(self) -> float:
        return self.end_us - self.begin_us


def kernels(step: Callable[[], object], device: torch.device) -> list[Kernel]:
    """Return the kernels of a step, in order; none on a CPU."""
    if device.type != "cuda":
        return []
    with torch.profiler.profile() as profile:
        step()
        synchronize(device)
    launched = [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset"))
    ]
    return sorted(launched, key=lambda kernel: kernel.begin_us)


def busy_us(launched: list[Kernel]) -> float:
    """Return how long some kernel ran: one that starts early runs beside the one before it."""
    busy, end = 0.0, 0.0
    for kernel in launched:
        busy += max(kernel.end_us - max(kernel.begin_us, end), 0.0)
        end = max(end, kernel.end_us)
    return busy


def check(name: str, logits: Tensor, expected: Tensor) -> None:
    """Exit where a variant computes something else than the model does."""
    error = float((logits.float() - expected).norm() / expected.norm())
    if not error < TOLERANCE[logits.dtype]:
        sys.exit(f"{name} is wrong: its logits are off by {error:.3f} of their norm")


def decoder(
    model: Any, variant: Variant, size: Size, *, compiled: bool, masked: bool
) -> Callable[[], Tensor]:
    """Return a decode step after a random context, of the logits [B, 1, vocabulary]."""
    set_attention(model, variant.attention)
    cache = make_cache(variant.cache, model, size)
    fill(cache, model, size)
    call = model
    if compiled and variant.backend is not None:
        mode = "reduce-overhead" if model.device.type == "cuda" else None
        options = {"mode": mode, "fullgraph": True, "dynamic": False}
        # Transformers counts the tokens in a ring of keys on the host, where each is a new number.
        if any(cache.is_sliding):
            options["dynamic"] = None
        call = torch.compile(model, backend=variant.backend, **options)
    tokens = torch.arange(size.batch, device=model.device)[:, None] % model.config.vocab_size
    mask = torch.ones(size.batch, size.capacity, device=model.device) if masked else None

    def step() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return call(
            input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True
        ).logits

    return step


def prefiller(model: Any, variant: Variant, size: Size) -> Callable[[], Tensor]:
    """Return the computation of a random prompt, of its last logits [B, 1, vocabulary]."""
    set_attention(model, variant.attention)
    cache = make_cache(variant.cache, model, size)
    generator = torch.Generator(model.device).manual_seed(0)
    shape = (size.batch, size.context)
    tokens = torch.randint(model.config.vocab_size, shape, generator=generator, device=model.device)

    def step() -> Tensor:
        for layer in cache.layers:  # what is cached is overwritten
            if hasattr(layer, "cumulative_length_int"):
                layer.cumulative_length_int = 0
            if isinstance(getattr(layer, "cumulative_length", None), Tensor):
                layer.cumulative_length.zero_()
        if hasattr(cache, "paged") or variant.cache == "dynamic":
            cache.reset()
        return model(
            input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits

    return step


def prepared(
    model: Any, phase: str, variant: Variant, size: Size, args: argparse.Namespace
) -> Callable[[], Tensor]:
    """Return a step of a phase, after all that an earlier one left behind."""
    torch.compiler.reset()
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if phase == "decode":
        return decoder(model, variant, size, compiled=args.compile, masked=args.mask)
    return prefiller(model, variant, size)


def measure(
    model: Any, phase: str, name: str, size: Size, expected: Tensor, args: argparse.Namespace
) -> Row:
    """Check and time a variant."""
    device, config = model.device, model.config
    step = prepared(model, phase, VARIANTS[name], size, args)
    check(f"{name}, {phase} of {size}", step(), expected)
    for _ in range(WARMUP if phase == "decode" else 1):
        step()
    time_of_step = seconds(step, args.repeats if phase == "decode" else 1, device)
    launched = kernels(step, device) if phase == "decode" else []
    products = sum(kernel.us for kernel in launched if MATRIX_PRODUCT.search(kernel.name))
    limit = step_bytes(model, size) / copy_bandwidth(device) / 1e9 if phase == "decode" else None
    tokens = size.batch * (1 if phase == "decode" else size.context)
    if args.profile:
        print_profile(name, launched)
    return Row(
        *(args.model, phase, *size, name),
        ms=time_of_step * 1e3,
        tokens_per_s=tokens / time_of_step,
        limit_ms=limit and limit * 1e3,
        share_of_limit=limit and limit / time_of_step,
        kernels_per_layer=len(launched) / config.num_hidden_layers if launched else None,
        matrix_products=products / busy_us(launched) if launched else None,
        peak_gb=torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
        **machine(device),
    )


copy_bandwidth = functools.cache(copy_gb_per_s)


def machine(device: torch.device) -> dict[str, str]:
    """Return the last fields of a row."""
    if device.type != "cuda":
        return dict.fromkeys(Row._fields[-5:], "") | {"gpu": "CPU", "torch": torch.__version__}
    return dict(zip(Row._fields[-5:], harness.describe_machine(), strict=True))


def print_profile(name: str, launched: list[Kernel]) -> None:
    """Print the kernels that took longest in a step."""
    times: dict[str, list[float]] = {}
    for kernel in launched:
        times.setdefault(kernel.name[:90], []).append(kernel.us)
    lines = [[kernel, len(us), sum(us)] for kernel, us in times.items()]
    lines.sort(key=lambda line: -line[2])
    print(f"\n{name}")
    print(tabulate(lines[:12], ["kernel", "times", "us"], floatfmt=".0f"))


def chosen(phase: str, only: list[str] | None) -> Iterator[str]:
    """Yield the variants to measure: of prompts, one for each cache and attention."""
    seen = set()
    for name, variant in VARIANTS.items():
        key = variant if phase == "decode" else variant[:2]
        if key not in seen and harness.chosen(name, only):
            seen.add(key)
            yield name


def report(rows: list[Row]) -> None:
    """Print a table of each phase."""
    print(", ".join(filter(None, rows[0][-5:])))
    for phase in PHASES:
        lines = [row for row in rows if row.phase == phase]
        if lines:
            shown = [
                (Size(*row[2:5]), *row[5:8], row.limit_ms, row.share_of_limit, *row[10:13])
                for row in lines
            ]
            headers = ["batch x context", "variant", "ms", "tokens/s", "limit ms", "of limit"]
            headers += ["kernels/layer", "products", "peak GB"]
            print(f"\n{lines[0].model}, {phase}")
            forms = ("", "", ".2f", ".0f", ".2f", ".2f", ".1f", ".2f", ".1f")
            print(tabulate(shown, headers, floatfmt=forms, missingval="-"))


def draw(rows: list[Row], path: Path) -> None:
    """Draw the share of the limit of every variant, a group of bars a size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    decoded = [row for row in rows if row.phase == "decode"]
    sizes = list(dict.fromkeys(Size(*row[2:5]) for row in decoded))
    names = list(dict.fromkeys(row.variant for row in decoded))
    figure, axis = plt.subplots(figsize=(9, 4.5))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        shares = {Size(*row[2:5]): row.share_of_limit for row in decoded if row.variant == name}
        places = [number + i * width for number in range(len(sizes))]
        axis.bar(places, [shares.get(size, 0.0) for size in sizes], width, label=name)
    axis.set_xticks([number + 0.4 - width / 2 for number in range(len(sizes))], map(str, sizes))
    axis.set(xlabel="batch x context (room in the cache)", ylim=(0, 1))
    axis.set_ylabel("of the speed of reading weights and keys")
    axis.set_title(f"decode step, {rows[0].model}, {rows[0].gpu}")
    axis.legend(loc="upper center", ncols=len(names), fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = harness.host_parser(__doc__)
    parser.set_defaults(repeats=20)
    parser.add_argument("--model", choices=MODELS, default="llama-3.1-8b")
    parser.add_argument("--rows", type=Size.parse, nargs="+", metavar="BATCHxCONTEXTxROOM")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="variants that start so")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--mask", action="store_true", help="of ones, as generate passes one")
    parser.add_argument("--tune", action="store_true", help="Inductor's coordinate descent")
    parser.add_argument("--profile", action="store_true", help="print the longest kernels")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    args = parser.parse_args(argv)
    args.rows = args.rows or [Size.parse(row) for row in GRID]
    steps = WARMUP + BLOCKS * args.repeats + 2
    for size in args.rows:
        if "decode" in args.phases and size.context + steps > size.capacity:
            parser.error(f"--rows {size}: a cache needs room for {steps} tokens more")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda":
        harness.require_gpu()
    torch.manual_seed(0)
    torch._inductor.config.coordinate_descent_tuning = args.tune
    model = make_model(args.model, device, getattr(torch, args.dtype))
    rows = []
    cases = [(size, phase) for size in args.rows for phase in args.phases]
    with torch.no_grad(), harness.progress(cases, unit="case") as progress:
        for size, phase in progress:
            progress.set_postfix_str(f"{phase} of {size}")
            expected = prepared(model, phase, VARIANTS["eager"], size, args)().float()
            for name in chosen(phase, args.only):
                progress.set_postfix_str(f"{phase} of {size}, {name}")
                rows.append(measure(model, phase, name, size, expected, args))
                if args.csv:
                    harness.write_csv(rows, args.csv)
    report(rows)
    if args.plot:
        draw(rows, args.plot)


if __name__ == "__main__":
    main()
