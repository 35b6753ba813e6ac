"""Statistics over the batch of all processes, whatever the device.

torch's ``SyncBatchNorm`` refuses the CPU, where the rest of a distributed run can be tested.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SyncBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` whose statistics in training are those of all processes together."""

    FINGERPRINT_AS = nn.BatchNorm2d  # once it is trained: fingerprints are the same

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if not self.training or _is_single_process():
            return super().forward(x)
        centerd, mean, squares, count = _center(x.float(), dims=(0, 2, 3))
        var = squares / count
        self._remember(mean.detach().flatten(), var.detach().flatten() * count / (count - 1))
        scale = (var + self.eps).rsqrt() * self.weight[:, None, None]
        return torch.addcmul(self.bias[:, None, None], centerd, scale).to(x.dtype)

    def _remember(self, mean: Tensor, var: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var, self.momentum)


def global_std(x: Tensor) -> Tensor:
    """Standard deviation of the values of all processes, as ``Tensor.std``."""
    if _is_single_process():
        return x.std()
    _, _, squares, count = _center(x, dims=tuple(range(x.ndim)))
    return (squares.squeeze() / (count - 1)).sqrt()


def _is_single_process() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def _center(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x less its mean over ``dims`` and processes, that mean, the sum of squares, and the count."""
    sums = x.sum(dim=dims, keepdim=True)
    own_count = sums.new_full((1,), x.numel() / sums.numel())
    *_, count = total = AllReduceSum.apply(torch.cat([sums.flatten(), own_count]))
    mean = total[:-1].view_as(sums) / count
    centerd = x - mean
    squares = AllReduceSum.apply(centerd.square().sum(dim=dims, keepdim=True))
    return centerd, mean, squares, count


class AllReduceSum(torch.autograd.Function):
    """The sum of a tensor over all processes; each process's gradient is the sum of them all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The same shape, the same in every process."""
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """As ``forward``."""
        total = grad.clone()
        dist.all_reduce(total)
        return total


def convert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Turn every ``nn.BatchNorm2d`` in a network into the global one, weights and names kept."""
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = SyncBatchNorm2d
    return module
