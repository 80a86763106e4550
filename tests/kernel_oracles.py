"""What the kernels must equal, in float64, and the random inputs to try; shared by both test files of the kernels."""
import torch
import torch.nn.functional as F

import train_gpt

CAP = 30.0
DIVISOR = 1.5  # of the normalised input of an MLP


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """||value - reference|| / ||reference||, in float64; NaN never passes a comparison with it."""
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


def cross_entropy_float64(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The formula, in float64."""
    return F.cross_entropy(CAP * torch.tanh(logits.double() / CAP), targets, reduction="none")


def mlp_float64(x: torch.Tensor, w_up: torch.Tensor, w_down: torch.Tensor) -> torch.Tensor:
    """The formula, in float64."""
    normed = x.double() / x.double().square().mean(-1, keepdim=True).sqrt() / DIVISOR
    before = normed @ w_up.double().T
    return torch.where(before > 0, before, before / 2).square() @ w_down.double().T


def mlp_up(x: torch.Tensor, factor: torch.Tensor, w_up: torch.Tensor) -> torch.Tensor:
    """What the MLP's kernel computes going forward, float32: the activation, rounded to where its last bit says that z < 0."""
    z = factor * F.linear(x, w_up)
    bits = F.leaky_relu(z, 0.5).square().view(torch.int32)
    return torch.where(z < 0, (bits >> 1 << 1) + 1, bits + 1 >> 1 << 1).view(torch.float32)


def mlp_up_backward(grad: torch.Tensor, factor: torch.Tensor, w_down: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """And going backward: the slope is twice the root of the activation, or minus the root where z was negative."""
    root = hidden.sqrt()
    return F.linear(grad, w_down.t()) * factor * torch.where(hidden.view(torch.int32) & 1 == 1, -root, 2 * root)


def random_mlp(rows: int, width: int, hidden: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, w_up, w_down and an output gradient."""
    generator = torch.Generator().manual_seed(rows + width + hidden)
    shapes = ((rows, width), (hidden, width), (width, hidden), (rows, width))
    x, w_up, w_down, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return x.requires_grad_(), w_up.requires_grad_(), w_down.requires_grad_(), grad


def check_cross_entropy(rows: int, width: int, dtype: torch.dtype, tolerance: float) -> None:
    """Losses and the gradient of a weighted sum of them against the formula in float64, on logits far into the cap."""
    generator = torch.Generator().manual_seed(rows * width)
    logits = (20 * torch.randn(rows, width, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(0, width, (rows,), generator=generator)
    weights = torch.randn(rows, generator=generator)
    losses = train_gpt.softcapped_cross_entropy(logits, targets, CAP)
    reference = cross_entropy_float64(logits, targets)
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(losses.double(), reference, atol=2e-5, rtol=1e-6)
    ours, = torch.autograd.grad(losses, logits, weights.to(losses.dtype))
    oracle, = torch.autograd.grad(reference, logits, weights.double())
    assert ours.dtype == dtype and relative_error(ours, oracle) < tolerance
