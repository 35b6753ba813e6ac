"""Frozen networks of a stage: used, moved with it, and kept out of its state."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

FrozenPrecision = Literal["float32", "bfloat16"]


class FrozenModules(dict[str, nn.Module | None]):
    """Networks by name, in eval mode, without gradients; None for an optional one that is absent.

    A plain dict, so that ``nn.Module`` does not register what is in it: a frozen network appears in
    no checkpoint, optimizer or EMA.

    Args:
        precision: the precision that the networks compute in. bfloat16 costs 0.8 % of the semantic
            latents' standard deviation, so the default is float32 whatever the trainer's precision.
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
        """The networks that are there, by name."""
        return {name: module for name, module in self.items() if module is not None}

    def apply_to_tensors(self, fn: Callable, recurse: bool) -> None:
        """Move or convert all of them, as ``nn.Module._apply`` does."""
        for module in self.present().values():
            module._apply(fn, recurse)

    @contextmanager
    def inference(self, device: torch.device) -> Iterator[None]:
        """No gradients, and ``precision`` instead of the trainer's, within the block."""
        bfloat16 = self.precision == "bfloat16"
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            yield
