"""What holds for every operator that writes to a cache."""

from __future__ import annotations

import functools

import pytest
import torch
from operators import WRITES, make_arguments, mutated, with_own_caches
from paged import storage
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_tkv
from torch_tkv.ops import checks


@pytest.mark.parametrize("stem", WRITES)
def test_opcheck_accepts_the_operator(stem: str) -> None:
    torch.library.opcheck(getattr(torch.ops.tkv, stem), (), make_arguments(stem))


@pytest.mark.parametrize("stem", WRITES)
def test_the_operator_compiles_without_a_graph_break_and_with_dynamic_shapes(stem: str) -> None:
    function = getattr(torch_tkv, stem)
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for tokens in (3, 9):
        kwargs = make_arguments(stem, tokens)
        expected = with_own_caches(stem, kwargs)
        torch.testing.assert_close(compiled(**kwargs), function(**expected), rtol=0, atol=0)
        for name in mutated(stem):
            assert torch.equal(storage(kwargs[name]), storage(expected[name]))


def gather_arguments() -> dict[str, object]:
    cache, indices = torch.randn(2, 8, 3, 16), torch.zeros(2, 2, dtype=torch.int32)
    caches = {"key_cache": cache, "value_cache": cache}
    return caches | {"block_table": indices, "cu_seq_lens": indices[0, :1], "num_tokens": 4}


def copy_arguments() -> dict[str, object]:
    cache = torch.randn(2, 8, 3, 16)
    pairs = torch.zeros(2, 2, dtype=torch.int32)
    return {"key_cache": cache, "value_cache": cache, "block_pairs": pairs}


ARGUMENTS = {stem: functools.partial(make_arguments, stem) for stem in WRITES}
ARGUMENTS |= {"gather_cache": gather_arguments, "copy_blocks": copy_arguments}


@pytest.mark.parametrize("stem", ARGUMENTS)
def test_float8_e4m3fn_is_refused_on_a_gpu_that_lacks_it(
    monkeypatch: pytest.MonkeyPatch, stem: str
) -> None:
    kwargs, cache = ARGUMENTS[stem](), "kv_cache"
    if cache not in kwargs:
        cache = "key_cache"
    with FakeTensorMode():  # there may be no GPU
        for name, arg in kwargs.items():
            if isinstance(arg, torch.Tensor):
                dtype = torch.float8_e4m3fn if name == cache else arg.dtype
                kwargs[name] = torch.empty(arg.shape, dtype=dtype, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(checks, "has_e4m3fn", checks.has_e4m3fn.__wrapped__)  # not the cached one
    with pytest.raises(TypeError) as caught:
        getattr(torch_tkv, stem)(**kwargs)
    got = f"got float8_e4m3fn {tuple(kwargs[cache].shape)}"
    requirement = "of another dtype on a GPU before sm_89: it has no float8_e4m3fn"
    assert str(caught.value) == f"{stem}: {cache} must be {requirement}, {got}"
