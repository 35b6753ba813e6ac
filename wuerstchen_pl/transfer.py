"""Copies between host memory and a device."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to ``device``; from host memory to a GPU, without waiting for queued work.

    Such a copy must start from pinned memory, which torch does not reuse before it is done.
    """
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
