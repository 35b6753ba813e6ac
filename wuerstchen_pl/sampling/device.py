"""Where the parts of a pipeline lie: all on one device, or only the one at work."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass
class DevicePlacement:
    """The device that a pipeline works on.

    ``offload``: between uses, parts lie on the CPU, and Stage B computes again at each step what it
    could keep, at a cost in memory, for all of them.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    offload: bool = False

    @contextmanager
    def on_device(self, module: nn.Module) -> Iterator[None]:
        """Have ``module`` on the device within the block."""
        if not self.offload:
            yield
            return
        try:
            module.to(self.device)
            yield
        finally:
            module.to("cpu")


def cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Turn weights to ``dtype``, but buffers and batch norms, few and delicate, to float32."""
    for part in module.modules():
        kind = torch.float32 if isinstance(part, nn.modules.batchnorm._BatchNorm) else dtype
        for parameter in part.parameters(recurse=False):
            parameter.data = parameter.data.to(kind)
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(part, name, buffer.float())
