"""Exponential moving average of a module's trainable parameters.

Our own, and not Lightning's ``WeightAveraging``, which copies frozen parts too, averages integer
buffers into nonsense and loses the raw weights when a validation raises.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """shadow <- shadow + (1 - d) (parameter - shadow), every ``every_steps`` steps.

    The decay warms up, d = min(decay, (1 + n) / (10 + n)) at update n, so that the random start is
    forgotten in runs of any length. Buffers are not averaged: batch-norm statistics are averages
    already.

    Args:
        decay: in [0, 1); 0.9999 is usual, the published code has 0.9 every 100 steps.
        every_steps: optimiser steps between two updates.
        start_step: optimiser steps before the first update, which copies.

    Raises:
        ValueError: if ``decay`` or ``every_steps`` is out of range.
    """

    def __init__(self, *, decay: float, every_steps: int = 1, start_step: int = 0) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"stage.ema.decay={decay} is out of range; use 0 <= decay < 1")
        if every_steps < 1:
            raise ValueError(f"stage.ema.every_steps={every_steps} is out of range; use 1 or more")
        self.decay, self.every_steps, self.start_step = decay, every_steps, start_step
        self.num_steps = 0
        self.num_updates = 0
        self.shadow: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Count one optimiser step of ``module``, and take its parameters in if it is time."""
        self.num_steps += 1
        if self.num_steps <= self.start_step or self.num_steps % self.every_steps:
            return
        params = _trainable(module)
        if self.num_updates == 0:
            self.shadow = {name: p.detach().clone() for name, p in params.items()}
        else:
            decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
            # after a resume the shadow may lie on another device
            shadow = [self.shadow[name].to(p.device) for name, p in params.items()]
            torch._foreach_lerp_(shadow, [p.detach() for p in params.values()], 1 - decay)
            self.shadow = dict(zip(params, shadow, strict=True))
        self.num_updates += 1

    @torch.no_grad()
    def overwrite(self, module: nn.Module, name: str, rows: Tensor) -> None:
        """Take ``rows`` of parameter ``name`` as they are; for rows that started anew."""
        if name in self.shadow:
            self.shadow[name][rows] = module.get_parameter(name)[rows].to(self.shadow[name].device)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Give ``module`` the averaged weights within the block, and its own back after it.

        Before the first update the weights stay as they are.
        """
        params = _trainable(module) if self.shadow else {}
        raw = {name: p.data for name, p in params.items()}
        try:
            for name, p in params.items():
                p.data = self.shadow[name].to(p.device)
            yield
        finally:
            for name, p in params.items():
                p.data = raw[name]

    def state_dict(self) -> dict[str, object]:
        """The counters and the averaged tensors by parameter name."""
        counters = {"num_steps": self.num_steps, "num_updates": self.num_updates}
        return {**counters, "shadow": self.shadow}

    def load_state_dict(self, state: dict) -> None:
        """Go on from ``state_dict()``."""
        self.num_steps, self.num_updates = state["num_steps"], state["num_updates"]
        self.shadow = dict(state["shadow"])


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
