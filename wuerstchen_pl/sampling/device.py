"""Placement and type of a pipeline's networks: all on one device, or only the active one."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

logger = logging.getLogger(__name__)


@dataclass
class DevicePlacement:
    """The device that a pipeline runs on.

    With ``offload``, networks are on the CPU unless in use, and Stage B saves memory by computing
    its conditioning in every step instead of caching it for all steps.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    offload: bool = False

    def move_to(self, device: torch.device) -> None:
        """Run on another device from now on; the caller moves the networks."""
        self.device = device

    def enable_offload(self) -> None:
        """Keep networks on the CPU unless in use, from now on."""
        self.offload = True

    @contextmanager
    def on_device(self, module: nn.Module) -> Iterator[None]:
        """Context in which ``module`` is on the device."""
        if not self.offload:
            yield
            return
        try:
            module.to(self.device)
            yield
        finally:
            module.to("cpu")


def sampling_dtype(requested: str | None, device: torch.device) -> torch.dtype:
    """The type of a pipeline's weights for sampling on a device.

    Args:
        requested: ``bfloat16`` or ``float32``; None chooses bfloat16 on GPUs that compute in it
            (NVIDIA's since Ampere), and float32 on other devices.
        device: the device of the pipeline.
    """
    if requested is None:
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    return getattr(torch, requested)


def log_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Log what ``sampling_dtype`` chose, and whether a CPU has a faster type."""
    advice = "dtype= chooses another type"
    if (device.type, dtype) == ("cpu", torch.float32) and cpu_has_bfloat16():
        advice = "dtype=bfloat16 is faster for large networks, as this CPU computes in it"
    logger.info("sampling on %s in %s; %s", device, dtype_name(dtype), advice)


def cpu_has_bfloat16() -> bool:
    """Whether the CPU has instructions for products of bfloat16: AMX or AVX-512 BF16.

    It is not chosen by itself, so that images agree across CPUs to float32 accuracy.
    """
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` or ``float32``, as in a config."""
    return str(dtype).removeprefix("torch.")


def cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast weights to ``dtype``, but buffers and batch norms to float32 for accuracy."""
    for part in module.modules():
        part_dtype = torch.float32 if isinstance(part, nn.modules.batchnorm._BatchNorm) else dtype
        for parameter in part.parameters(recurse=False):
            parameter.data = parameter.data.to(part_dtype)
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(part, name, buffer.float())
