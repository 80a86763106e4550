"""What a GPU would run, at the record's size, as shapes and dtypes only: meta tensors, the kernels and the flash attention on."""
from __future__ import annotations

import pytest
import torch

import train_gpt

TOKENS = 98_304


def meta_batch(segments: int) -> train_gpt.Batch:
    """One rank's share of the record's batch."""
    def empty(size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")
    return train_gpt.Batch(empty(TOKENS, torch.int64), empty(TOKENS, torch.int64), empty(TOKENS, torch.int64),
                           empty(segments, torch.int32), empty(TOKENS, torch.int32), 2048)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> train_gpt.GPT:
    """The record's model on a device that is no CPU, as on a Hopper GPU: torch's flash attention, the kernels on."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(train_gpt, "attention_backend", train_gpt.AttentionBackend("varlen", train_gpt.load_flash("varlen")))
    monkeypatch.setattr(train_gpt, "has_tma", torch.compiler.assume_constant_result(lambda: True))
    with torch.device("meta"):
        return train_gpt.GPT(train_gpt.Config(), torch.bfloat16)


def operators(losses: torch.Tensor) -> set[str]:
    """Names of the operators in the graph of `losses`."""
    seen, stack = set(), [losses.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [before for before, _ in node.next_functions]
    return {node.name() for node in seen}


@pytest.mark.parametrize("depth", [1, 3, 4])
def test_a_step_of_the_record_in_bfloat16_with_every_kernel(depth: int, model: train_gpt.GPT) -> None:
    losses = model(meta_batch(128), train_gpt.loop_schedule(model.cfg, depth))
    names = " ".join(operators(losses))
    assert all(word in names for word in ("FusedMLP", "varlen_attn", "exclude_self", "cross_entropy", "AddProduct"))
    losses.mean().backward()
    assert losses.shape == (TOKENS,) and losses.dtype == torch.float32
    for name, param in model.named_parameters():
        assert param.grad is not None and param.grad.shape == param.shape and param.grad.dtype == torch.float32, name


def test_attention_and_kernels_are_one_graph(model: train_gpt.GPT) -> None:
    def visit(q: torch.Tensor, k: torch.Tensor, w_up: torch.Tensor, w_down: torch.Tensor, batch: train_gpt.Batch) -> torch.Tensor:
        y = train_gpt.attention(q, k, k, batch.cu_seqlens, batch.max_seqlen).flatten(1)
        return train_gpt.softcapped_cross_entropy(train_gpt.fused_mlp(y, 1.0, w_up, w_down), batch.targets, 30.0)

    shapes = ((TOKENS, 8, 64), (TOKENS, 4, 64), (2048, 512), (512, 2048))
    inputs = [torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True) for shape in shapes]
    compiled = torch.compile(visit, backend="aot_eager", fullgraph=True)
    losses = compiled(*inputs, meta_batch(128))
    grads = torch.autograd.grad(losses, inputs, torch.empty_like(losses))
    assert [(g.shape, g.dtype) for g in grads] == [(torch.Size(shape), torch.bfloat16) for shape in shapes]
