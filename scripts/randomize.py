"""Random weights at which an error of any layer shows in the output."""

from typing import Any

import torch


@torch.no_grad()
def randomize(net: Any, seed: int) -> Any:
    """Randomize all parameters and running statistics, at a scale that keeps activations near 1."""
    device = next(net.parameters()).device
    rng = torch.Generator(device).manual_seed(seed)
    for name, parameter in net.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
        std = 0.5 if name.endswith(("gamma", "beta", "gammas")) else fan_in**-0.5
        parameter.copy_(torch.randn(parameter.shape, generator=rng, device=device) * std)
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=rng, device=device) * 0.1)
        if name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=rng, device=device) + 0.5)
    return net.eval()
