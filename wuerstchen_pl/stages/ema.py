"""Exponential moving average of a module's trainable parameters.

Lightning's ``WeightAveraging`` is not used because it copies frozen networks too, takes the mean of
integer buffers, does not support sharded weights, and leaves raw and EMA weights swapped if
validation raises.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from wuerstchen_pl.distributed.fsdp2 import index_copy, local_shards, shard_like, unsharded


class EMA:
    """shadow <- shadow + (1 - d) (parameter - shadow), every ``every_steps`` optimizer steps.

    Buffers are not averaged: batch-norm statistics are already running means, so a module with EMA
    weights keeps its current buffers. The shadow of a sharded parameter is sharded the same way.

    Args:
        decay: d, in [0, 1); 0.9999 is usual, the published code uses 0.9 every 100 steps.
        every_steps: optimizer steps between two updates.
        start_step: optimizer steps before the first update, which copies the parameters.
        warmup: use d = min(decay, (1 + n) / (10 + n)) at update n, so that runs of any length
            forget the random initialization; False uses d = decay from the second update on.
        device: "cpu" keeps the shadow in host memory, which saves 4 bytes per parameter on the
            device. As every update copies as many, which the device waits for, use it with rare
            updates: 0.99 every 100 steps has the time constant of 0.9999 every step.

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
            raise ValueError(f"decay={decay} is out of range; use 0 <= decay < 1")
        if every_steps < 1:
            raise ValueError(f"every_steps={every_steps} is out of range; use 1 or more")
        self.decay, self.every_steps, self.start_step = decay, every_steps, start_step
        self.warmup, self.device = warmup, device
        self.num_steps = 0
        self.num_updates = 0
        self.shadow: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Count one optimizer step of ``module``; update the shadow if an update is due."""
        self.num_steps += 1
        if self.num_steps <= self.start_step or self.num_steps % self.every_steps:
            return
        params = _trainable(module)
        if self.num_updates == 0:
            self.shadow = {name: self._to_shadow_device(p).clone() for name, p in params.items()}
        else:
            self._align(params)
            max_decay = (1 + self.num_updates) / (10 + self.num_updates) if self.warmup else 1.0
            decay = min(self.decay, max_decay)
            current = [self._to_shadow_device(p) for p in local_shards(params.values())]
            torch._foreach_lerp_(local_shards(self.shadow.values()), current, 1 - decay)
        self.num_updates += 1

    def _to_shadow_device(self, tensor: Tensor) -> Tensor:
        return tensor if self.device is None else tensor.to(self.device)

    def _align(self, params: Mapping[str, Tensor]) -> None:
        """Give a shadow from a checkpoint the parameters' sharding, order and device."""
        for name, p in params.items():
            shadow = shard_like(self.shadow.pop(name), p)
            device = torch.device(self.device or p.device)
            # ``to`` takes as long as the update for a sharded tensor, even on the same device
            self.shadow[name] = shadow if shadow.device == device else shadow.to(device)

    def overwrite_rows(self, name: str, rows: Tensor, values: Tensor) -> None:
        """Overwrite rows in the shadow of parameter ``name``, such as re-initialized ones."""
        if name in self.shadow:
            index_copy(self.shadow[name], rows.to(self.shadow[name].device), values)

    @contextmanager
    def swapped_in(self, module: nn.Module) -> Iterator[None]:
        """Use the EMA weights in ``module`` within the block; restore the raw weights after it.

        Before the first update the raw weights are used. Sharded weights stay sharded.
        """
        params = {n: p.detach() for n, p in _trainable(module).items()} if self.shadow else {}
        if params:
            self._align(params)
        raw = {name: p.clone() for name, p in params.items()}
        try:
            for name, p in params.items():
                p.copy_(self.shadow[name])
            yield
        finally:  # in place: FSDP identifies a sharded weight by its storage
            for name, p in params.items():
                p.copy_(raw[name])

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """``swapped_in`` with sharded weights gathered; every process must enter it."""
        with self.swapped_in(module), unsharded(module):
            yield

    def state_dict(self) -> dict[str, object]:
        """The counters, and the EMA weights by parameter name, sharded like the weights."""
        counters = {"num_steps": self.num_steps, "num_updates": self.num_updates}
        return {**counters, "shadow": self.shadow}

    def load_state_dict(self, state: dict) -> None:
        """Restore ``state_dict()``; the weights may be sharded differently now."""
        self.num_steps, self.num_updates = state["num_steps"], state["num_updates"]
        self.shadow = dict(state["shadow"])


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
