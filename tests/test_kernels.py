"""The kernels' torch twins against float64, and the kernels themselves in Triton's interpreter, on a CPU.

The interpreter must be on before Triton is imported and everything else wants it off, so those checks are a process of
their own. What they show is indexing and mathematics, not races, memory limits or speed (bench/gpu.py has those).
"""
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from kernel_oracles import CAP, DIVISOR, check_cross_entropy, mlp_float64, random_mlp, relative_error

import train_gpt

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None,
                                  reason="Triton is not installed: pip install triton==3.7.0 to check the kernels")


@needs_triton
def test_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
               str(Path(__file__).with_name("interpreted_kernels.py"))]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
                                "PYTHONPATH": os.pathsep.join([str(Path(train_gpt.__file__).parent), *sys.path[1:]])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-500:]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("rows, width", [(40, 2), (1, 70), (50, 1000), (7, 33)])
def test_cross_entropy_equals_float64(rows: int, width: int, dtype: torch.dtype, tolerance: float,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_gpt, "CROSS_ENTROPY_CHUNK", 3 * width + 1)       # several chunks, the last one ragged
    check_cross_entropy(rows, width, dtype, tolerance)


def test_cross_entropy_never_holds_float32_logits_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, width = 512, 1024
    monkeypatch.setattr(train_gpt, "CROSS_ENTROPY_CHUNK", 16 * width)
    largest = largest_float32_tensor(lambda: train_gpt.softcapped_cross_entropy(
        torch.randn(rows, width).bfloat16().requires_grad_(), torch.randint(0, width, (rows,)), CAP).sum().backward())
    assert largest <= 16 * width, f"a float32 tensor of {largest} elements was made"


def largest_float32_tensor(function: Callable[[], None]) -> int:
    """Elements of the largest float32 tensor that any operation inside `function` returns, random inputs left out."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = operation(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor) and t.dtype == torch.float32 and "randn" not in str(operation):
                    Watch.largest = max(Watch.largest, t.numel())
            return out

    with Watch():
        function()
    return Watch.largest


def test_cross_entropy_and_mlp_compile_in_one_graph() -> None:
    def loss(x: torch.Tensor, w_up: torch.Tensor, w_down: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return train_gpt.softcapped_cross_entropy(train_gpt.fused_mlp(x, DIVISOR, w_up, w_down), targets, CAP).mean()

    *inputs, _ = random_mlp(20, 16, 64, torch.float32)
    targets = torch.randint(0, 16, (20,))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs, targets), loss(*inputs, targets))
    for ours, eager in zip(torch.autograd.grad(compiled(*inputs, targets), inputs),
                           torch.autograd.grad(loss(*inputs, targets), inputs)):
        torch.testing.assert_close(ours, eager)


def test_mlp_equals_float64() -> None:
    *inputs, grad = random_mlp(31, 12, 50, torch.float64)
    out, reference = train_gpt.fused_mlp(inputs[0], DIVISOR, *inputs[1:]), mlp_float64(*inputs)
    torch.testing.assert_close(out, reference)
    for ours, oracle in zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(reference, inputs, grad)):
        torch.testing.assert_close(ours, oracle)


@needs_triton
def test_mlp_kernel_builds_for_hopper_with_wgmma_and_tma_and_fits_its_memory() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tile_m, tile_n, tile_k = train_gpt.MLP_TILE
    for backward in (False, True):
        second = [tile_k, tile_n] if backward else [tile_n, tile_k]
        half = f"tensordesc<bf16[{tile_m},{tile_n // 2}]>"
        signature = {"a_desc": f"tensordesc<bf16[{tile_m},{tile_k}]>", "b_desc": f"tensordesc<bf16{second}>".replace(" ", ""),
                     "hidden_desc": half, "out_desc": half, "factors": "*fp32", "rows": "i32", "columns": "i32", "depth": "i32"}
        constants = {"BACKWARD": backward, "BIT": 16, "TILE_M": tile_m, "TILE_N": tile_n, "TILE_K": tile_k, "PROGRAMS": 132}
        source = ASTSource(train_gpt.mlp_kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "num_stages": 3})
        assert "wgmma.mma_async" in built.asm["ptx"] and "cp.async.bulk.tensor" in built.asm["ptx"]
        assert built.metadata.shared <= 227 * 1024


def test_a_norm_from_its_output_has_the_gradient_of_the_norm() -> None:
    x, grad = (torch.randn(7, 40, generator=torch.Generator().manual_seed(i)) for i in range(2))
    x[3] *= 1e-4                                                                # where the norm's epsilon counts
    exact = x.double().requires_grad_()
    reference = exact / (exact.square().mean(-1, keepdim=True) + train_gpt.NORM_EPS).sqrt() / DIVISOR
    ours = train_gpt.NormFromOutput.apply(x.requires_grad_(), DIVISOR)
    assert relative_error(ours, reference) < 1e-6
    assert relative_error(torch.autograd.grad(ours, x, grad)[0], torch.autograd.grad(reference, exact, grad.double())[0]) < 1e-6


@pytest.mark.parametrize("compiled", [False, True])
def test_a_sum_in_the_product_leaves_what_it_adds_to_alone(compiled: bool) -> None:
    x, y, w, grad = (torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64, requires_grad=True)
                     for i, shape in enumerate([(9, 6), (9, 5), (6, 5), (9, 6)]))
    before = x.detach().clone()
    add_product = torch.compile(train_gpt.AddProduct.apply, backend="aot_eager", fullgraph=True) if compiled else train_gpt.AddProduct.apply
    out, reference = add_product(x, y, w), x + y @ w.T
    torch.testing.assert_close(out, reference)
    assert torch.equal(x, before)
    for ours, oracle in zip(torch.autograd.grad(out, (x, y, w), grad), torch.autograd.grad(reference, (x, y, w), grad)):
        torch.testing.assert_close(ours, oracle)


class Sizes(NamedTuple):
    cu_seqlens: torch.Tensor


def test_a_norm_compiles_where_all_sizes_are_dynamic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_gpt, "kernels_take", lambda x: True)
    torch._dynamo.reset()
    norm = train_gpt.compiled(SimpleNamespace(compile=True), dynamic=True,
                              function=lambda batch, x: train_gpt.rms_norm(train_gpt.head_norm(train_gpt.rms_norm(x)), 2.0))
    x = torch.randn(6, 16, requires_grad=True)
    out = norm(Sizes(torch.tensor([0, 6])), x)
    plain = F.rms_norm(x, (16,))
    plain = F.rms_norm(F.rms_norm(plain, (16,)), (16,)) / 2
    torch.testing.assert_close(out, plain)
    for ours, oracle in zip(torch.autograd.grad(out.square().sum(), x), torch.autograd.grad(plain.square().sum(), x)):
        torch.testing.assert_close(ours, oracle, atol=1e-5, rtol=1e-4)
