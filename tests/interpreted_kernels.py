"""Checks of the Triton kernels that need Triton's CPU interpreter; test_kernels.py runs this file with TRITON_INTERPRET=1."""
import numpy as np
import pytest
import torch
import triton.language as tl
from kernel_oracles import CAP, DIVISOR, check_cross_entropy, mlp_float64, mlp_up, mlp_up_backward, random_mlp, relative_error
from triton.runtime import interpreter

import train_gpt


@pytest.fixture
def kernels_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send CPU tensors through the kernels, with the interpreter's bfloat16 products repaired.

    The interpreter keeps bfloat16 as its bits in uint16 and multiplies those; widened to float32 first, they are right.
    """
    def widen(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    plain_dot = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot",
                        lambda self, a, b, *rest: plain_dot(self, widen(a), widen(b), *rest))
    monkeypatch.setattr(train_gpt, "kernels_take", lambda x: True)
    monkeypatch.setattr(train_gpt, "MLP_TILE", (32, 64, 16))


def fused_mlp(x: torch.Tensor, w_up: torch.Tensor, w_down: torch.Tensor) -> torch.Tensor:
    return train_gpt.fused_mlp(x, DIVISOR, w_up, w_down)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 1.5e-2)])
@pytest.mark.parametrize("rows, width, hidden", [(1, 8, 8), (33, 16, 64), (70, 40, 72), (95, 24, 200)])
def test_mlp_equals_float64(kernels_on: None, rows: int, width: int, hidden: int, dtype: torch.dtype,
                                        tolerance: float) -> None:
    *inputs, grad = random_mlp(rows, width, hidden, dtype)
    out = fused_mlp(*inputs)
    reference = mlp_float64(*inputs)
    assert "FusedMLP" in type(out.grad_fn).__name__
    assert relative_error(out, reference) < tolerance
    grads = torch.autograd.grad(out, inputs, grad)
    for ours, oracle in zip(grads, torch.autograd.grad(reference, inputs, grad.double())):
        assert ours.dtype == dtype and relative_error(ours, oracle) < tolerance


def test_mlp_kernel_equals_its_torch_twin(kernels_on: None) -> None:
    x, w_up, w_down, grad = (t.detach() for t in random_mlp(45, 24, 136, torch.float32))
    factor = torch.linspace(0.1, 3, len(x))[:, None]
    hidden = train_gpt.mlp_up_op(x, factor, w_up)
    torch.testing.assert_close(hidden, mlp_up(x, factor, w_up), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(train_gpt.mlp_up_backward_op(grad, factor, w_down, hidden),
                               mlp_up_backward(grad, factor, w_down, hidden), atol=1e-4, rtol=1e-5)


def test_the_activation_keeps_its_sign_in_its_last_bit_without_a_bias(kernels_on: None) -> None:
    x, w_up, _, _ = (t.detach() for t in random_mlp(64, 24, 136, torch.bfloat16))
    hidden, z = train_gpt.mlp_up_op(x, torch.ones(len(x), 1), w_up), x.double() @ w_up.double().T
    exact = torch.where(z < 0, z / 2, z).square()
    clear = z.abs() > 1e-3
    assert torch.equal((hidden.view(torch.int16) & 1 == 1)[clear], (z < 0)[clear])
    error = (hidden.double() / exact - 1)[clear]
    assert error.abs().max() < 2**-7 * 1.01 and error.mean().abs() < 2e-4


@pytest.mark.parametrize("width", [12, 20])
def test_mlp_of_an_unaligned_width_takes_the_torch_path(kernels_on: None, width: int) -> None:
    *inputs, _ = random_mlp(9, width, 24, torch.float32)
    assert relative_error(fused_mlp(*inputs), mlp_float64(*inputs)) < 2e-6


def test_mlp_compiles_in_one_graph(kernels_on: None) -> None:
    *inputs, grad = random_mlp(33, 16, 64, torch.float32)
    compiled = torch.compile(lambda *t: fused_mlp(*t) * 1.0, backend="aot_eager", fullgraph=True)
    out = compiled(*inputs)
    torch.testing.assert_close(out, fused_mlp(*inputs))
    for ours, eager in zip(torch.autograd.grad(out, inputs, grad),
                           torch.autograd.grad(fused_mlp(*inputs), inputs, grad)):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("rows, width", [(40, 2), (1, 100), (5, 1023), (3, 1025), (64, 256)])
def test_cross_entropy_equals_float64(kernels_on: None, rows: int, width: int, dtype: torch.dtype,
                                                  tolerance: float) -> None:
    check_cross_entropy(rows, width, dtype, tolerance)


def test_cross_entropy_reads_strided_rows(kernels_on: None) -> None:
    wide = torch.randn(6, 40)
    targets = torch.randint(0, 24, (6,))
    torch.testing.assert_close(train_gpt.softcapped_cross_entropy(wide[:, 8:32], targets, CAP),
                               train_gpt.softcapped_cross_entropy(wide[:, 8:32].contiguous(), targets, CAP))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("tokens, kv_heads, groups", [(1, 1, 1), (37, 2, 2), (9, 4, 2), (20, 2, 3)])
def test_exclusive_attention_equals_float64(kernels_on: None, tokens: int, kv_heads: int, groups: int, dtype: torch.dtype,
                                            tolerance: float) -> None:
    generator = torch.Generator().manual_seed(tokens)
    wide = torch.randn(tokens, kv_heads + 1, 16, generator=generator).to(dtype)
    y, gate, grad = (torch.randn(tokens, kv_heads * groups, *rest, generator=generator).to(dtype) for rest in ((16,), (), (16,)))
    inputs = [y.requires_grad_(), wide[:, 1:].detach().requires_grad_(), gate.requires_grad_()]  # the rows of v lie apart
    out = train_gpt.exclude_self(*inputs)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    value = exact[1].repeat_interleave(groups, dim=1)
    unit = value / value.norm(dim=-1, keepdim=True)
    reference = exact[2].unsqueeze(-1) * (exact[0] - (exact[0] * unit).sum(-1, keepdim=True) * unit)
    assert relative_error(out, reference) < tolerance
    for ours, oracle in zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(reference, exact, grad.double())):
        assert ours.dtype == dtype and relative_error(ours, oracle) < tolerance
