from __future__ import annotations

import random

import pytest
import serve
import torch
from llama import Llama, LlamaConfig
from serve import Engine, Request

from torch_tkv import BlockAllocator, OutOfBlocks

CONFIG = LlamaConfig(
    dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_dim=96, max_positions=48
)
needs_gpu = pytest.mark.gpu


def make_model(device: str = "cpu") -> Llama:
    torch.manual_seed(0)
    model = Llama(CONFIG)
    for parameter in model.parameters():
        # Wider than the initial weights, so that attention is far from uniform.
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.to(device).eval()


def make_requests(count: int) -> list[Request]:
    rng = random.Random(0)
    prefix = rng.choices(range(1, 256), k=12)
    requests = []
    for i in range(count):
        prompt = rng.choices(range(1, 256), k=rng.randint(1, 20))
        prompt = prefix + prompt if i % 3 == 0 else prompt
        requests.append(Request(prompt, rng.randint(1, 14), arrival=float(i)))
    return requests


@torch.no_grad()
def continue_alone(model: Llama, request: Request) -> list[int]:
    """Generate with the forward of training, which knows no cache."""
    tokens = request.prompt.copy()
    for _ in range(request.max_new_tokens):
        window = torch.tensor([tokens], device=model.embedding.weight.device)
        tokens.append(int(model(window)[0, -1].argmax()))
        if tokens[-1] == serve.END:
            break
    return tokens[len(request.prompt) :]


def step_clock():
    """Return a clock on which every look takes a tenth of a second."""
    times = iter(range(10**6))
    return lambda: next(times) / 10


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("num_blocks", [200, 13], ids=["roomy", "scarce"])
def test_every_request_gets_the_text_it_would_get_alone(
    num_blocks: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = []
    append = BlockAllocator.append

    def counted(self: BlockAllocator, *args: object) -> list[tuple[int, int]]:
        try:
            return append(self, *args)
        except OutOfBlocks as error:
            refusals.append(error)
            raise

    monkeypatch.setattr(BlockAllocator, "append", counted)
    model, requests = make_model(device), make_requests(18)
    engine = Engine(model, num_blocks=num_blocks, block_size=4, max_tokens=17, max_sequences=5)
    for cache in engine.cache.buffers():
        cache.fill_(float("nan"))  # no slot may be read before it is written
    serve.serve(engine, requests, step_clock())
    for request in requests:
        assert request.generated == continue_alone(model, request)
        assert len(request.times) == len(request.generated)
        assert request.arrival <= request.times[0]
        assert request.times == sorted(request.times)
    assert engine.allocator.num_free_blocks == num_blocks
    assert bool(refusals) == (num_blocks == 13)


def test_a_known_prefix_is_not_computed_again() -> None:
    engine = Engine(make_model(), num_blocks=20, block_size=4, max_tokens=64, max_sequences=1)
    tokens = []
    update = engine.batch.update
    engine.batch.update = lambda sequences, counts: (
        tokens.append(sum(counts)),
        update(sequences, counts),
    )
    prompt = list(range(1, 23))
    serve.serve(engine, [Request(prompt, 1), Request([*prompt[:18], 99], 1)])
    assert tokens == [22, 3]  # 16 of the 18 fill blocks


def test_a_request_that_can_never_fit_is_refused() -> None:
    engine = Engine(make_model(), num_blocks=3, block_size=4, max_sequences=1)
    with pytest.raises(ValueError, match="request must have 1 to 12 tokens, got 13"):
        engine.submit(Request([1] * 10, 3))
    with pytest.raises(ValueError, match="request must have 1 to 12 tokens, got 3"):
        engine.submit(Request([], 3))


def test_graphs_come_in_doubling_sizes_up_to_the_largest() -> None:
    assert serve.sizes(1, 6) == [1, 2, 4, 6]
    assert serve.sizes(16, 256) == [16, 32, 64, 128, 256]
    assert serve.sizes(5, 5) == [5]


def test_it_reports_throughput_and_latencies(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--requests", "3", "--max-prompt", "20", "--max-new-tokens", "3", "--rate", "1000"]
    serve.main([*small, "--device", "cpu", "--no-compile", "--compare"])
    printed = capsys.readouterr().out
    assert printed.count("to the first token") == 2
    assert "3 of 3 requests have the same text both ways" in printed
