"""Fused GELU and ConvNeXt V2 global response norm, which saves only its input for backward.

Between its two linear layers, a block is four times as wide as outside; in training, the fusion
saves memory by not keeping activations of that width other than the input.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class GeluGRN(nn.Module):
    """y = x (1 + gamma N(x)) + beta with x = GELU(u) and N(x) = |x|_HW / mean_C |x|_HW.

    ConvNeXt V2 (Woo et al. 2023, arXiv 2301.00808), Eq. 1-3.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, u: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        # Inductor's loops for a CPU compute GELU twice, more slowly than oneDNN, and sum over
        # positions with a stride: in Stage B on a Xeon, they took three times as long.
        for_sampling = torch.compiler.is_compiling() and not torch.is_grad_enabled()
        if for_sampling and u.device.type == "cpu":
            return _uncompiled_gelu_grn(u, self.gamma, self.beta)
        return _GeluGRNFunction.apply(u, self.gamma, self.beta)


class _GeluGRNFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        y, norm = _gelu_grn(u, gamma, beta)
        ctx.save_for_backward(u, gamma, norm)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, gamma, norm = ctx.saved_tensors
        x = F.gelu(u)
        mean = norm.mean(dim=-1, keepdim=True) + EPS
        response = norm / mean
        grad_dot_x = (grad * x).sum(dim=(1, 2), keepdim=True, dtype=norm.dtype)
        grad_response = grad_dot_x * gamma
        mean_term = (grad_response * norm).mean(dim=-1, keepdim=True) / mean.square()
        grad_norm = grad_response / mean - mean_term
        grad_x = torch.addcmul(
            grad * (1 + gamma * response).to(grad.dtype), x, (grad_norm / norm).to(grad.dtype)
        )
        grad_u = torch.ops.aten.gelu_backward(grad_x, u)
        grad_beta = grad.sum(dim=(0, 1, 2), dtype=norm.dtype).to(gamma.dtype)
        return grad_u, (grad_dot_x * response).sum(dim=(0, 1, 2)).to(gamma.dtype), grad_beta


@torch.library.custom_op("wuerstchen_pl::gelu_grn", mutates_args=())
def _uncompiled_gelu_grn(u: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return _gelu_grn(u, gamma, beta)[0]


@_uncompiled_gelu_grn.register_fake
def _(u: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return torch.empty_like(u)


def _gelu_grn(u: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and |x|_HW (B, 1, 1, C) of x = GELU(u), in float32 or more."""
    x = F.gelu(u)
    norm = (_sum_of_squares(x) + EPS_SQUARED).sqrt()
    response = norm / (norm.mean(dim=-1, keepdim=True) + EPS)
    scale = (1 + gamma * response).to(x.dtype)
    # Compiled by torch 2.11, a function with two names for one tensor has a gradient of zero.
    out = None if torch.compiler.is_compiling() else x
    return torch.addcmul(beta.to(x.dtype), x, scale, out=out), norm


EPS = 1e-6
EPS_SQUARED = 1e-12
"""Keeps the gradient of the square root finite for a channel of zeros."""
PART = 2**18
"""Elements whose squares stay in the cache of a core until they are summed."""


def _sum_of_squares(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, 1, 1, C) in float32 or more.

    On a CPU it goes part by part, as otherwise most of the time is spent on memory for the squares.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return _sum_of_squares_of_part(x)
    rows = max(1, PART * x.shape[1] // max(1, x.numel()))  # a batch may be empty
    return cast(Tensor, sum(map(_sum_of_squares_of_part, x.split(rows, dim=1))))


def _sum_of_squares_of_part(x: Tensor) -> Tensor:
    # Squares of float16 are computed in float32, as they would overflow from 256 on.
    squares = (x.float() if x.dtype == torch.float16 else x).square()
    dtype = torch.promote_types(squares.dtype, torch.float32)  # bfloat16 would lose small ones
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        # A sum in another dtype copies its input to that dtype first, unlike one in bfloat16,
        # which also adds in float32, and rounds once.
        squares = squares.sum(dim=2, keepdim=True)
    return squares.sum(dim=(1, 2), keepdim=True, dtype=dtype)
