"""Frozen networks of a stage: moved between devices with it, but not part of its state."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

FrozenPrecision = Literal["float32", "bfloat16"]


class FrozenModules(dict[str, nn.Module | None]):
    """Networks by name, in eval mode, without gradients; None for an optional one that is absent.

    This is a plain dict, so that ``nn.Module`` does not register the networks, and they are not in
    checkpoints, optimizer or EMA.

    Args:
        precision: precision of the computation, independent of the trainer's. In bfloat16, the
            error is 0.8 % of the semantic latents' standard deviation, so float32 is the default.
    """

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
        """Apply ``fn`` to all tensors, such as to move them, like ``nn.Module._apply``."""
        for module in self.present().values():
            module._apply(fn, recurse)

    @contextmanager
    def inference(self, device: torch.device) -> Iterator[None]:
        """Within the block, disable gradients and use ``precision`` instead of the trainer's."""
        bfloat16 = self.precision == "bfloat16"
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            yield
