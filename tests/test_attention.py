"""attention(): values and gradients against a dense float64 oracle, causality to the last bit, the choice of a backend."""
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import train_gpt

LENGTHS = [[1], [7], [1, 1, 1], [5, 5, 5, 1], [3, 0, 0, 4], [0, 6, 2, 2, 0], [17, 1, 9, 9], [0, 0]]


def bounds(lengths: list[int]) -> Tensor:
    """Segment lengths -> cu_seqlens."""
    return torch.tensor([0] + lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32)


def random_qkv(tokens: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v that want gradients."""
    generator = torch.Generator().manual_seed(tokens)
    return tuple(torch.randn(tokens, h, width, generator=generator).to(dtype).requires_grad_()
                 for h in (heads, kv_heads, kv_heads))


def oracle(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """One dense float64 softmax over the stream under a mask of same segment and not later."""
    tokens, heads, width = q.shape
    k, v = (t.double().repeat_interleave(heads // t.size(1), 1) for t in (k, v))
    segment = torch.bucketize(torch.arange(tokens), cu_seqlens[1:].long(), right=True)
    seen = (segment[:, None] == segment[None]) & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    scores = torch.einsum("ihd,jhd->hij", q.double(), k) / width**0.5
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def eager(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """attention() as it is."""
    return train_gpt.attention(q, k, v, cu_seqlens, longest)


def masked(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """What attention() is inside a graph, as it is."""
    return train_gpt.masked_attention(q, k, v, cu_seqlens)


def compiled(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """attention() inside one graph."""
    torch._dynamo.reset()
    function = torch.compile(lambda *t: train_gpt.attention(*t, longest) * 1.0, backend="aot_eager", fullgraph=True)
    return function(q, k, v, cu_seqlens)


@pytest.mark.parametrize("run", [eager, masked, compiled])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_attention_equals_a_dense_oracle_in_values_and_gradients(lengths: list[int], dtype: torch.dtype, tolerance: float,
                                                                 run: Callable[..., Tensor]) -> None:
    q, k, v = random_qkv(sum(lengths), 4, 2, 8, dtype)
    cu_seqlens = bounds(lengths)
    out, reference = run(q, k, v, cu_seqlens, 17), oracle(q, k, v, cu_seqlens)
    assert out.dtype == dtype and out.shape == q.shape
    torch.testing.assert_close(out.double(), reference, atol=tolerance, rtol=tolerance)
    grad = torch.randn(q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if not sum(lengths):
        return
    for ours, theirs in zip(torch.autograd.grad(out, (q, k, v), grad.to(dtype)),
                            torch.autograd.grad(reference, (q, k, v), grad)):
        torch.testing.assert_close(ours.double(), theirs.double(), atol=3 * tolerance, rtol=3 * tolerance)


@pytest.mark.parametrize("heads, kv_heads", [(8, 4), (4, 4), (4, 1)])
def test_any_grouping_of_heads(heads: int, kv_heads: int) -> None:
    q, k, v = random_qkv(23, heads, kv_heads, 16, torch.float64)
    cu_seqlens = bounds([11, 12])
    torch.testing.assert_close(train_gpt.attention(q, k, v, cu_seqlens, 12), oracle(q, k, v, cu_seqlens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_later_tokens_and_other_segments_change_nothing_to_the_last_bit(dtype: torch.dtype) -> None:
    lengths = [700, 64, 3, 64]
    q, k, v = (t.detach() for t in random_qkv(sum(lengths), 8, 4, 64, dtype))
    cu_seqlens = bounds(lengths)
    before = train_gpt.attention(q, k, v, cu_seqlens, 700)
    for position in (1, 350, 699, 700, 720, 765, 830):
        changed = [torch.cat([t[:position], 9 * torch.randn_like(t[position:])]) for t in (q, k, v)]
        after = train_gpt.attention(*changed, cu_seqlens, 700)
        assert torch.equal(after[:position], before[:position])
        changed = [torch.cat([9 * torch.randn_like(t[:700]), t[700:]]) for t in (q, k, v)]
        assert torch.equal(train_gpt.attention(*changed, cu_seqlens, 700)[700:], before[700:])


def test_inputs_may_be_views_of_one_projection() -> None:
    packed = torch.randn(12, 8, 16, dtype=torch.float64)
    q, k, v = packed[:, :4], packed[:, 4:6], packed[:, 6:]
    cu_seqlens = bounds([4, 4, 4])
    torch.testing.assert_close(train_gpt.attention(q, k, v, cu_seqlens, 4), oracle(q, k, v, cu_seqlens))


def test_one_graph_serves_every_packing_of_the_same_size() -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.testing.CompileCounter()
    function = torch.compile(lambda *t: train_gpt.attention(*t, 32), backend=counters, fullgraph=True)
    for lengths in ([32, 0, 0, 0], [10, 10, 10, 2], [1, 2, 29, 0]):
        q, k, v = random_qkv(32, 4, 2, 8, torch.float32)
        torch.testing.assert_close(function(q, k, v, bounds(lengths)), train_gpt.attention(q, k, v, bounds(lengths), 32))
    assert counters.frame_count == 1


@pytest.fixture
def restore_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the process's backend back after a test that chooses one."""
    monkeypatch.setattr(train_gpt, "attention_backend", train_gpt.attention_backend)


def test_a_cpu_gets_sdpa_and_the_log_its_name(restore_backend: None) -> None:
    for name in ("auto", "sdpa"):
        assert train_gpt.resolve_attention(name, torch.device("cpu")).name == "sdpa" == train_gpt.attention_backend.name


@pytest.mark.parametrize("name", ["fa3", "fa4", "varlen"])
def test_a_flash_backend_on_a_cpu_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(ValueError, match=f"ATTN_BACKEND={name} needs a CUDA device"):
        train_gpt.resolve_attention(name, torch.device("cpu"))


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch, restore_backend: None) -> Callable[[int, set[str]], None]:
    """A function that makes resolve_attention see a GPU of some generation on which only some libraries import."""
    def pretend(capability: int, installed: set[str]) -> None:
        def load(name: str) -> Callable[[], str]:
            if name not in installed:
                raise ImportError(f"No module named {name}")
            return lambda: name
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (capability, 0))
        monkeypatch.setattr(train_gpt, "load_flash", load)
    return pretend


@pytest.mark.parametrize("capability, installed, chosen", [
    (9, {"fa3", "fa4", "varlen"}, "fa3"), (9, {"fa4", "varlen"}, "fa4"), (9, {"varlen"}, "varlen"), (9, set(), "sdpa"),
    (10, {"fa3", "fa4", "varlen"}, "fa4"), (8, {"fa3", "fa4", "varlen"}, "varlen")])
def test_the_order_of_backends(pretend_gpu: Callable, capability: int, installed: set[str], chosen: str) -> None:
    pretend_gpu(capability, installed)
    backend = train_gpt.resolve_attention("auto", torch.device("cuda"))
    assert backend.name == chosen and backend is train_gpt.attention_backend
    assert chosen == "sdpa" if backend.varlen is None else backend.varlen() == chosen


def test_a_backend_that_was_passed_over_is_named_with_the_reason(pretend_gpu: Callable) -> None:
    pretend_gpu(9, {"varlen"})
    assert train_gpt.resolve_attention("auto", torch.device("cuda")).skipped == \
        "fa3: No module named fa3; fa4: No module named fa4"


@pytest.mark.parametrize("name, hint", [("fa3", "flash_attn_3"), ("fa4", "pip install flash-attn-4")])
def test_a_forced_backend_that_is_missing_is_an_error_that_says_what_to_install(pretend_gpu: Callable, name: str,
                                                                                hint: str) -> None:
    pretend_gpu(9, {"varlen"})
    with pytest.raises(ValueError, match=f"ATTN_BACKEND={name} cannot be loaded.*{hint}"):
        train_gpt.resolve_attention(name, torch.device("cuda"))


def test_a_process_on_a_gpu_never_lets_cudnn_attend(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("is_available", lambda: True), ("device_count", lambda: 1), ("set_device", lambda device: None)):
        monkeypatch.setattr(torch.cuda, name, value)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        assert train_gpt.Ranks.start({}).device == torch.device("cuda", 0)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize("name, activated", [("fa3", ["FA3"]), ("fa4", ["FA4"]), ("varlen", [])])
def test_torchs_own_function_is_called_causal_and_grouped(name: str, activated: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.nn.attention as library
    import torch.nn.attention.varlen as varlen

    calls: list[str] = []

    def varlen_attn(q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
                    window_size: tuple[int, int], enable_gqa: bool) -> Tensor:
        assert window_size == (-1, 0) and enable_gqa and cu_seq_q is cu_seq_k and max_q == max_k == 5
        return train_gpt.segment_attention(q, k, v, cu_seq_q)

    monkeypatch.setattr(library, "activate_flash_attention_impl", calls.append)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    run = train_gpt.load_flash(name)
    q, k, v = random_qkv(9, 4, 2, 8, torch.float32)
    cu_seqlens = bounds([4, 5])
    torch.testing.assert_close(run(q, k, v, cu_seqlens, cu_seqlens, 5, 5), train_gpt.attention(q, k, v, cu_seqlens, 5))
    assert calls == activated


def test_varlen_traces_forward_and_backward_at_the_size_of_the_record_without_a_gpu() -> None:
    pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no variable-length attention")
    run = train_gpt.load_flash("varlen")
    q, k, v = (torch.empty(98_304, heads, 64, dtype=torch.bfloat16, device="meta", requires_grad=True) for heads in (8, 4, 4))
    cu_seqlens = torch.empty(257, dtype=torch.int32, device="meta")
    out = torch.compile(lambda *t: run(*t, cu_seqlens, cu_seqlens, 2048, 2048), backend="aot_eager", fullgraph=True)(q, k, v)
    grads = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert out.shape == q.shape and [g.shape for g in grads] == [q.shape, k.shape, v.shape]
