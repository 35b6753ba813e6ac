"""The projections of attention to queries, keys and values: one matrix product, or three."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FusedQKV(nn.Linear):
    """Queries, keys and values by one matrix product: (..., C) -> (..., 3C)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 3 * channels)

    def keys_values(self, cond: Tensor) -> Tensor:
        """(..., C) condition -> its keys and values, (..., 2C)."""
        channels = self.in_features
        return F.linear(cond, self.weight[channels:], self.bias[channels:])


class SplitQKV(nn.Module):
    """The same as three layers, of which each can have an adapter.

    Args:
        weight: (3C, C) of the matrix product, which is shared, not copied.
        bias: (3C,) likewise.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = map(shared_linear, weight.chunk(3), bias.chunk(3))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> queries, keys and values, (..., 3C)."""
        return torch.cat([self.to_q(x), self.to_k(x), self.to_v(x)], dim=-1)

    def keys_values(self, cond: Tensor) -> Tensor:
        """(..., C) condition -> its keys and values, (..., 2C)."""
        return torch.cat([self.to_k(cond), self.to_v(cond)], dim=-1)


def shared_linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear layer whose parameters share the memory of these."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    return layer
