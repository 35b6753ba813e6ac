"""Batch statistics over all processes, on any device.

torch's ``SyncBatchNorm`` does not support the CPU, on which distributed runs are tested.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SyncBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with statistics over all processes in training.

    On a GPU it is torch's ``SyncBatchNorm``, which communicates once forward and once backward. On
    the CPU, statistics are computed here, with two all-reduces forward and two backward.
    """

    FINGERPRINT_AS = nn.BatchNorm2d  # trained weights are interchangeable with it
    # What torch's forward pass reads. It is borrowed, because DDP refuses subclasses on the CPU.
    process_group = None
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if x.is_cuda:
            return nn.SyncBatchNorm.forward(cast(nn.SyncBatchNorm, self), x)
        if not self.training or _is_single_process():
            return super().forward(x)
        centered, mean, squares, count = _center(x.float(), dims=(0, 2, 3))
        var = squares / count
        self._update_running(mean.detach().flatten(), var.detach().flatten() * count / (count - 1))
        scale = (var + self.eps).rsqrt() * self.weight[:, None, None]
        return torch.addcmul(self.bias[:, None, None], centered, scale).to(x.dtype)

    def _update_running(self, mean: Tensor, var: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var, self.momentum)


def global_std(x: Tensor) -> Tensor:
    """``Tensor.std`` over the values of all processes."""
    if _is_single_process():
        return x.std()
    _, _, squares, count = _center(x, dims=tuple(range(x.ndim)))
    return (squares.squeeze() / (count - 1)).sqrt()


def _is_single_process() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def _center(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x minus its mean over ``dims`` and processes, the mean, the sum of squares, and the count."""
    sums = x.sum(dim=dims, keepdim=True)
    local_count = sums.new_full((1,), x.numel() / sums.numel())
    *_, count = total = AllReduceSum.apply(torch.cat([sums.flatten(), local_count]))
    mean = total[:-1].view_as(sums) / count
    centered = x - mean
    squares = AllReduceSum.apply(centered.square().sum(dim=dims, keepdim=True))
    return centered, mean, squares, count


class AllReduceSum(torch.autograd.Function):
    """The sum of a tensor over all processes; gradients are summed over processes as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The sum, in the shape of ``x``, the same on every process."""
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """The sum of the gradients of all processes."""
        total = grad.clone()
        dist.all_reduce(total)
        return total


def convert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Replace every ``nn.BatchNorm2d`` inside a network by a ``SyncBatchNorm2d``, in place.

    The parameters and buffers stay the same objects.
    """
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            setattr(module, name, _synchronized(child))
        else:
            convert_sync_batchnorm(child)
    return module


def _synchronized(norm: nn.BatchNorm2d) -> SyncBatchNorm2d:
    replacement = SyncBatchNorm2d(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats,
        device="meta",
    )  # fmt: skip
    for name, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
        setattr(replacement, name, tensor)
    return replacement.train(norm.training)
