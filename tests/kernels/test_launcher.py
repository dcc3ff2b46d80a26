from __future__ import annotations

import threading

import pytest
import torch
import triton
from paged import make_caches
from rope import make_rotation

from torch_tkv import reference
from torch_tkv.kernels import launcher, paged_attention, reshape_and_cache, rotary_embedding
from torch_tkv.kernels.launcher import Launcher


def accept(*args, **kwargs) -> None:
    """Check nothing."""


@pytest.fixture
def write() -> Launcher:
    return Launcher(reshape_and_cache.prepare, accept)


def arguments(tokens: int = 5, offset: int = 0, device: str = "cuda") -> list[torch.Tensor]:
    """Return arguments of a write whose key starts `offset` elements into its storage."""
    key, value = torch.randn(2, tokens * 48 + 8, device=device)
    caches = make_caches("NHD", 6, 8, 3, 16, device=device)
    slots = torch.randperm(48, device=device)[:tokens]
    key = key[offset : offset + tokens * 48].view(tokens, 3, 16)
    return [key, value[: tokens * 48].view(tokens, 3, 16), *caches, slots]


def assert_writes(write: Launcher, *, times: int = 3, **options) -> None:
    for _ in range(times):
        args = arguments(**options)
        expected = [cache.clone() for cache in args[2:4]]
        reference.reshape_and_cache(args[0], args[1], *expected, args[4])
        write(*args)
        assert torch.equal(args[2], expected[0])
        assert torch.equal(args[3], expected[1])


@pytest.fixture
def triton_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that go through Triton's own launch."""
    launches = []
    run = launcher._run

    def record(launch: launcher.Launch) -> object:
        launches.append(launch.kernel.__name__)
        return run(launch)

    monkeypatch.setattr(launcher, "_run", record)
    return launches


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The arguments with which kernels that do nothing are launched directly, without a GPU."""
    starts: list[tuple] = []
    entry = (lambda *args: starts.append(args)), ()
    monkeypatch.setattr(launcher, "_run", lambda launch: object())
    monkeypatch.setattr(launcher, "_entry", lambda compiled: entry)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    monkeypatch.setattr(launcher, "_knows_triton", lambda: True)
    return starts


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The calls that are described because no guard recognised them."""
    calls: list[tuple] = []
    signature = launcher._signature

    def record(*call) -> object:
        calls.append(call)
        return signature(*call)

    monkeypatch.setattr(launcher, "_signature", record)
    return calls


@pytest.mark.gpu
def test_a_signature_goes_through_triton_once(write: Launcher, triton_launches: list[str]) -> None:
    assert_writes(write)
    assert len(triton_launches) == 1
    assert_writes(write, tokens=7)
    assert len(triton_launches) == 2


@pytest.mark.gpu
def test_a_misaligned_view_is_another_signature(
    write: Launcher, triton_launches: list[str]
) -> None:
    for offset in (0, 1, 4, 0, 1):
        assert_writes(write, offset=offset)
    assert len(triton_launches) == 2  # 4 floats are 16 bytes


@pytest.mark.gpu
def test_sizes_of_one_and_multiples_of_sixteen_are_told_apart(write: Launcher) -> None:
    for tokens in (1, 16, 17, 32, 1, 16):
        assert_writes(write, tokens=tokens)


@pytest.mark.gpu
def test_arguments_are_checked_before_the_first_launch_of_a_signature() -> None:
    checked = []

    def check(*args, **kwargs) -> None:
        checked.append(args[4].dtype)
        if args[4].dtype == torch.float32:
            raise TypeError("slots")

    write = Launcher(reshape_and_cache.prepare, check)
    assert_writes(write)
    args = arguments()
    for _ in range(2):
        with pytest.raises(TypeError, match="slots"):
            write(*args[:4], args[4].float())
    assert checked == [torch.int64, torch.float32, torch.float32]


@pytest.mark.gpu
def test_threads_on_their_own_streams_do_not_disturb_each_other(write: Launcher) -> None:
    failures = []

    def work(tokens: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                assert_writes(write, times=50, tokens=tokens)
        except Exception as failure:  # pytest sees no exception of another thread
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(tokens,)) for tokens in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.gpu
def test_a_known_signature_is_captured_and_every_output_is_its_own(
    triton_launches: list[str],
) -> None:
    attend = Launcher(paged_attention.prepare, accept)
    cache = torch.randn(4, 16, 2, 16, device="cuda")
    query = torch.randn(2, 4, 16, device="cuda")
    table = torch.tensor([[0, 1], [2, 3]], device="cuda")
    indices = (table, torch.tensor([20, 7], device="cuda"), torch.arange(3, device="cuda"))
    first = attend(query, cache, cache, *indices, 0.3)
    second = attend(query, cache, cache, *indices, 0.3)
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(query, cache, cache, *indices, 0.3)
    query.normal_()
    graph.replay()
    assert torch.equal(captured, attend(query, cache, cache, *indices, 0.3))
    assert len(triton_launches) == 2  # it decodes and merges


@pytest.mark.gpu
def test_several_outputs_are_allocated_anew_and_returned_in_order(
    triton_launches: list[str],
) -> None:
    rotate = Launcher(rotary_embedding.prepare, accept)
    kept = []
    for _ in range(3):
        kwargs = make_rotation(5, (4, 2), device="cuda")
        expected = reference.rotary_embedding(**kwargs)
        kept.append((rotate(*kwargs.values()), expected))
    assert len(triton_launches) == 1
    for outs, expected in kept:
        assert isinstance(outs, tuple)
        for out, exact in zip(outs, expected, strict=True):
            assert torch.equal(out, exact)


@pytest.mark.gpu
def test_one_tensor_for_two_arguments_does_not_bind_them_together(write: Launcher) -> None:
    args = arguments()
    write(args[0], args[0], *args[2:])
    assert_writes(write)


@pytest.mark.gpu
def test_launch_hooks_see_every_launch(write: Launcher) -> None:
    seen = []
    hooks = triton.knobs.runtime.launch_enter_hook
    assert_writes(write)

    def hook(metadata) -> None:
        seen.append(metadata.get()["name"])

    hooks.add(hook)
    try:
        assert_writes(write, times=3)
    finally:
        hooks.remove(hook)
    assert seen == ["_reshape_and_cache"] * 3


@pytest.mark.gpu
def test_models_that_alternate_and_inference_mode_keep_their_own_launches(
    write: Launcher, triton_launches: list[str]
) -> None:
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            for tokens in (1, 2, 3, 4, 5, 6, 1, 2, 6, 6, 6, 1):
                assert_writes(write, times=1, tokens=tokens)
    assert len(triton_launches) == 6


@pytest.mark.gpu
def test_launches_that_alternate_are_found_without_describing_the_call(
    write: Launcher, described: list[tuple]
) -> None:
    for turn in range(4):
        for tokens in range(1, 9):
            assert_writes(write, times=1, tokens=tokens)
        if turn == 2:  # each was compiled, and then seen to follow another
            described.clear()
    with torch.inference_mode():
        assert_writes(write, tokens=3)
    assert len(described) <= 2


@pytest.mark.gpu
def test_remembered_signatures_stay_few(write: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_MAX_SIGNATURES", 4)
    for tokens in range(1, 11):
        assert_writes(write, tokens=tokens)
        assert len(write._bound) <= 4


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_each_device_has_its_own_kernel_and_stream(write: Launcher) -> None:
    for device in ("cuda:0", "cuda:1", "cuda:0", "cuda:1"):
        assert_writes(write, device=device)
    assert torch.cuda.current_device() == 0


def test_a_guard_tells_calls_apart() -> None:
    guard = launcher._guard((*arguments(device="cpu"), None, 3), {"wrap": False})
    tensors = arguments(device="cpu")
    pointers = [tensor.data_ptr() for tensor in tensors]
    assert guard((*tensors, None, 3), {"wrap": False}) == pointers
    for others in ((None, 4), (None, 3.0), (3, None), (tensors[0], 3), (None,), (None, 3, None)):
        assert guard((*tensors, *others), {"wrap": False}) is None
    for options in ({"wrap": True}, {"wrap": 0}, {}, {"wrap": False, "more": False}):
        assert guard((*tensors, None, 3), options) is None
    assert guard((*tensors[:4], None, None, 3), {"wrap": False}) is None
    for unlike in (arguments(tokens=6, device="cpu"), arguments(offset=1, device="cpu")):
        assert guard((*unlike, None, 3), {"wrap": False}) is None
    misaligned = (*arguments(offset=1, device="cpu"), None, 3)
    assert launcher._guard(misaligned, {})(misaligned, {}) is None


def test_a_guard_of_tensors_alone_tells_calls_apart() -> None:
    tensors = arguments(device="cpu")
    guard = launcher._guard(tuple(tensors), {})
    assert guard(tuple(tensors), {}) == [tensor.data_ptr() for tensor in tensors]
    for unlike in (None, 3, tensors[4].int(), tensors[4][:-1], tensors[4][::2], tensors[3]):
        assert guard((*tensors[:4], unlike), {}) is None
    assert guard((*tensors, None), {}) is None
    assert guard((*tensors, tensors[0].clone()), {}) is None
    assert guard(tuple(tensors[:4]), {}) is None
    assert guard(tuple(tensors), {"wrap": False}) is None


def test_equal_arguments_of_other_types_have_signatures_of_their_own() -> None:
    one = (1, 1.0, True)
    assert len({launcher._signature((x,), {}) for x in one}) == 3
    assert len({launcher._signature((), {"wrap": x}) for x in one}) == 3


def test_calls_that_autograd_would_record_are_told_apart() -> None:
    plain, required = arguments(device="cpu"), arguments(device="cpu")
    required[0].requires_grad_()
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            assert launcher._guard(tuple(plain), {})(tuple(plain), {})
            assert not launcher._guard(tuple(plain), {})(tuple(required), {})
    with torch.no_grad():
        guard = launcher._guard(tuple(required), {})
        assert guard(tuple(required), {})
        signature = launcher._signature(required, {})
        assert signature == launcher._signature(plain, {})
    assert not guard(tuple(required), {})
    assert signature != launcher._signature(required, {})
    assert signature == launcher._signature(plain, {})


def test_a_call_that_autograd_would_record_is_checked_again(starts: list[tuple]) -> None:
    def check(*args, **kwargs) -> None:
        if torch.is_grad_enabled() and args[0].requires_grad:
            raise NotImplementedError

    write = Launcher(reshape_and_cache.prepare, check)
    args = arguments(device="cpu")
    args[0].requires_grad_()
    for _ in range(2):
        with torch.no_grad():
            for _ in range(3):
                write(*args)
        with pytest.raises(NotImplementedError):
            write(*args)
    assert len(starts) == 5
    assert len(write._bound) == 1


def test_a_known_launch_takes_the_stream_and_the_pointers_of_each_call(
    write: Launcher, starts: list[tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    for stream in (7, 7, 8):
        args = arguments(device="cpu")
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _, stream=stream: stream)
        write(*args)
    launch = reshape_and_cache.prepare(*args)
    pointers = [arg.data_ptr() for arg in args]
    rest = (None, None, *launch.scalars, *launch.constexprs)
    assert starts[-1] == (*launch.grid, 8, *pointers, *rest)
    assert [start[3] for start in starts] == [7, 8]  # the first call went through Triton


def test_hooks_of_any_kind_are_seen_as_long_as_they_are_there(
    starts: list[tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = []

    def prepare(*args, **kwargs) -> launcher.Launch:
        prepared.append(args)
        return reshape_and_cache.prepare(*args, **kwargs)

    def hook(*args, **kwargs) -> None:
        """Be there."""

    write = Launcher(prepare, accept)
    args = arguments(device="cpu")
    write(*args)
    runtime, kernel = triton.knobs.runtime, reshape_and_cache._reshape_and_cache
    for where, name, hooks in (
        (runtime.launch_enter_hook, "calls", [hook]),
        (runtime.launch_exit_hook, "calls", [hook]),
        (runtime, "launch_enter_hook", hook),
        (runtime, "launch_exit_hook", hook),
        (kernel, "pre_run_hooks", [hook]),
    ):
        prepared.clear(), starts.clear()
        with monkeypatch.context() as patch:
            patch.setattr(where, name, hooks, raising=False)
            for _ in range(2):
                write(*args)
            assert (len(prepared), len(starts)) == (2, 0), name
        write(*args)
        assert (len(prepared), len(starts)) == (2, 1), name


def test_launches_that_alternate_are_recognised_again_in_another_mode(
    write: Launcher, starts: list[tuple], described: list[tuple]
) -> None:
    calls = [arguments(tokens=tokens, device="cpu") for tokens in (4, 5)]
    for _ in range(3):
        for args in calls:
            write(*args)
    described.clear()
    with torch.inference_mode():
        for _ in range(4):
            for args in calls:
                write(*args)
    assert len(described) == 2


def test_an_unknown_triton_keeps_its_own_launch_and_says_so_once(
    device: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(triton, "__version__", "4.0.0")
    launcher._knows_triton.cache_clear()
    try:
        monkeypatch.setattr(launcher, "_run", lambda launch: object())
        write = Launcher(reshape_and_cache.prepare, accept)
        for _ in range(3):
            write(*arguments(device=device))
        assert not write._bound
        said = [str(w.message) for w in recwarn if "torch_tkv launches" in str(w.message)]
        assert len(said) == 1
        assert "with 4.0.0 it uses Triton's own launch" in said[0]
    finally:
        launcher._knows_triton.cache_clear()
