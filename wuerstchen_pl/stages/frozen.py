"""Frozen networks of a stage: on its device when they are used, but not part of its state."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

FrozenPrecision = Literal["float32", "bfloat16"]


class FrozenModules(dict[str, nn.Module | None]):
    """Networks by name, in eval mode, without gradients; None for an optional one that is absent.

    This is a plain dict, so that ``nn.Module`` does not register the networks, and they are not in
    checkpoints, optimizer or EMA. They are moved between devices with their stage; but while
    ``on_demand`` is set, as during training, a network stays where it is until a step uses it. So
    networks that only sampling needs, such as Stage B in Stage C, take no memory on the device
    between validations.

    Args:
        precision: precision of the computation, independent of the trainer's. In bfloat16, the
            error is 0.8 % of the semantic latents' standard deviation, so float32 is the default.
    """

    on_demand = False

    def __init__(self, precision: FrozenPrecision = "float32") -> None:
        if precision not in ("float32", "bfloat16"):
            raise ValueError(f"frozen_precision={precision!r} is unknown; use float32 or bfloat16")
        super().__init__()
        self.precision = precision

    def register(self, name: str, module: nn.Module | None) -> None:
        """Freeze ``module`` and keep it under ``name``."""
        self[name] = None if module is None else module.eval().requires_grad_(False)

    def present(self) -> dict[str, nn.Module]:
        """The networks that are not None, by name."""
        return {name: module for name, module in self.items() if module is not None}

    def apply_to_tensors(self, fn: Callable, recurse: bool) -> None:
        """Apply ``fn`` to all tensors, such as to move them, unless they move ``on_demand``."""
        if self.on_demand:
            return
        for module in self.present().values():
            module._apply(fn, recurse)

    def to(self, device: torch.device | str) -> None:
        """Move all networks."""
        for module in self.present().values():
            module.to(device)

    @contextmanager
    def computing(self, network: nn.Module, device: torch.device) -> Iterator[None]:
        """Move ``network`` to the device, and use ``precision`` for it within the block."""
        if not is_on(device, network):
            network.to(device)
        bfloat16 = self.precision == "bfloat16"
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            yield

    @contextmanager
    def inference(self, network: nn.Module, device: torch.device) -> Iterator[None]:
        """``computing`` without gradients."""
        with torch.no_grad(), self.computing(network, device):
            yield

    @contextmanager
    def all_on(self, device: torch.device) -> Iterator[None]:
        """Have all networks on the device within the block; then move others back to the CPU."""
        elsewhere = [net for net in self.present().values() if not is_on(device, net)]
        try:
            for network in elsewhere:
                network.to(device)
            yield
        finally:
            for network in elsewhere:
                network.to("cpu")


def is_on(device: torch.device, network: nn.Module) -> bool:
    """Whether all parameters of a network are on a device."""
    return all(parameter.device == device for parameter in network.parameters())
