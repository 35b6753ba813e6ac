"""Exponential moving average of a module's trainable parameters.

Our own, and not Lightning's ``WeightAveraging``, which copies frozen parts too, averages integer
buffers into nonsense, knows no sharded weights, and loses the raw ones when a validation raises.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from wuerstchen_pl.distributed.fsdp2 import index_copy, shard_like, unsharded


class EMA:
    """shadow <- shadow + (1 - d) (parameter - shadow), every ``every_steps`` steps.

    Buffers are not averaged: batch-norm statistics are averages already, and an averaged model has
    the present ones. A sharded parameter has a shadow that is sharded alike.

    Args:
        decay: in [0, 1); 0.9999 is usual, the published code has 0.9 every 100 steps.
        every_steps: optimizer steps between two updates.
        start_step: optimizer steps before the first update, which copies.
        warmup: let d = min(decay, (1 + n) / (10 + n)) at update n, so that the random start is
            forgotten in runs of any length; False has d = decay from the second update on.
        device: "cpu" keeps the shadow in the host's memory: 4 bytes a parameter less on the device,
            and as many to be copied at every update.

    Raises:
        ValueError: if ``decay`` or ``every_steps`` is out of range.
    """

    def __init__(
        self,
        *,
        decay: float,
        every_steps: int = 1,
        start_step: int = 0,
        warmup: bool = True,
        device: Literal["cpu"] | None = None,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"stage.ema.decay={decay} is out of range; use 0 <= decay < 1")
        if every_steps < 1:
            raise ValueError(f"stage.ema.every_steps={every_steps} is out of range; use 1 or more")
        self.decay, self.every_steps, self.start_step = decay, every_steps, start_step
        self.warmup, self.device = warmup, device
        self.num_steps = 0
        self.num_updates = 0
        self.shadow: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Count one optimizer step of ``module``, and take its parameters in if it is time."""
        self.num_steps += 1
        if self.num_steps <= self.start_step or self.num_steps % self.every_steps:
            return
        params = {name: p.detach() for name, p in _trainable(module).items()}
        if self.num_updates == 0:
            self.shadow = {name: self._placed(p).clone() for name, p in params.items()}
        else:
            self._settle(params)
            warm = (1 + self.num_updates) / (10 + self.num_updates) if self.warmup else 1.0
            present = [self._placed(p) for p in params.values()]
            torch._foreach_lerp_(list(self.shadow.values()), present, 1 - min(self.decay, warm))
        self.num_updates += 1

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor if self.device is None else tensor.to(self.device)

    def _settle(self, params: dict[str, Tensor]) -> None:
        """Bring a shadow that was read from a checkpoint to where the parameters are, in order."""
        for name, p in params.items():
            shadow = shard_like(self.shadow.pop(name), p)
            self.shadow[name] = shadow.to(self.device or p.device)

    def overwrite(self, name: str, rows: Tensor, values: Tensor) -> None:
        """Take ``values`` as rows of parameter ``name``; for rows that started anew."""
        if name in self.shadow:
            index_copy(self.shadow[name], rows.to(self.shadow[name].device), values)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Give ``module`` the averaged weights within the block, and its own back after it.

        Before the first update the weights stay as they are. Sharded weights are whole within the
        block, and all processes have to enter it.
        """
        params = {n: p.detach() for n, p in _trainable(module).items()} if self.shadow else {}
        if params:
            self._settle(params)
        weights, raw = list(params.values()), [p.clone() for p in params.values()]
        try:
            for name, p in params.items():
                p.copy_(self.shadow[name])
            with unsharded(module):
                yield
        finally:  # in place, as sharded weights are known by where they lie
            for p, kept in zip(weights, raw, strict=True):
                p.copy_(kept)

    def state_dict(self) -> dict[str, object]:
        """The counters and the averaged tensors by parameter name, sharded as the weights are."""
        counters = {"num_steps": self.num_steps, "num_updates": self.num_updates}
        return {**counters, "shadow": self.shadow}

    def load_state_dict(self, state: dict) -> None:
        """Go on from ``state_dict()``, however the weights are sharded now."""
        self.num_steps, self.num_updates = state["num_steps"], state["num_updates"]
        self.shadow = dict(state["shadow"])


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
