"""Profile one training step before training begins: operations, and memory for activations."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from wuerstchen_pl.batch import Batch
from wuerstchen_pl.models.activations import SavedActivations
from wuerstchen_pl.stages.stage import Stage

UNBATCHED_KEYS = ("size", "empty_text", "is_unique")
"""Batch keys with a single value for all samples."""


class StepProfile(NamedTuple):
    """Cost of a training step on one process."""

    flops_per_sample: float
    """Forward and backward pass; a multiply-add is two operations."""
    saved_bytes: int
    """Tensors that the forward pass of the whole batch saves for backward, without weights."""
    saved_bytes_per_sample: float


_PROFILES: WeakKeyDictionary[nn.Module, StepProfile] = WeakKeyDictionary()


def profile_step_once(module: L.LightningModule, batch: Batch) -> StepProfile:
    """``profile_step`` of the first batch of a run; later calls return the same result."""
    if module not in _PROFILES:
        _PROFILES[module] = profile_step(module, batch)
    return _PROFILES[module]


def forget_profile(module: L.LightningModule) -> None:
    """Make ``profile_step_once`` profile a run again, because its steps save other tensors now."""
    _PROFILES.pop(module, None)


def profile_step(module: L.LightningModule, batch: Batch) -> StepProfile:
    """Run a training step with two and with four samples of a batch, without side effects.

    Operations with gradients count three times, as the backward pass needs two for each. Memory
    that does not grow with the batch, such as weights cast to another precision, counts once.
    Every process must call it.
    """
    rows = len(batch["caption"])
    few, more = (2, 4) if rows >= 4 else (rows, rows)
    flops, saved = _profile(module, first_rows(batch, few))
    if few == more:
        return StepProfile(flops / rows, saved, saved / rows)
    more_flops, more_saved = _profile(module, first_rows(batch, more))
    per_sample = (more_saved - saved) / (more - few)
    total = round(saved + per_sample * (rows - few))
    return StepProfile((more_flops - flops) / (more - few), total, per_sample)


def _profile(module: L.LightningModule, batch: Batch) -> tuple[int, int]:
    """Operations and saved bytes of one training step."""
    saved = SavedActivations()
    precision = module.trainer.precision_plugin.train_step_context()
    with (
        # Dynamo skips code for good that it first meets under a dispatch mode (torch 2.11)
        torch.compiler.set_stance("force_eager"),
        _without_side_effects(module),
        precision,
        torch.enable_grad(),
        saved.collect(),
        _OperationCounter() as counter,
    ):
        loss = module.training_step(_cloned(batch), 0)
    # only now, when the storage of weights that FSDP had gathered for a block is empty again
    saved_bytes = saved.nbytes(module.parameters())
    del loss
    return counter.number, saved_bytes


def first_rows(batch: Batch, number: int) -> Batch:
    """The first ``number`` samples of a batch."""
    rows: Any = {k: v if k in UNBATCHED_KEYS else cast(Any, v)[:number] for k, v in batch.items()}
    return rows


def _cloned(batch: Batch) -> Batch:
    """A batch with copies of its tensors."""
    clone: Any = {k: v.clone() if isinstance(v, Tensor) else v for k, v in batch.items()}
    return clone


class _OperationCounter(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = getattr(func, "_overloadpacket", None)
        if packet in flop_registry:
            factor = 3 if torch.is_grad_enabled() else 1
            self.number += factor * flop_registry[packet](*args, **kwargs, out_val=out)
        return out


@contextmanager
def _without_side_effects(module: L.LightningModule) -> Iterator[None]:
    """Restore buffers, RNG state and accumulated losses after the block, and disable logging."""
    before = {name: b.detach().clone() for name, b in module.named_buffers()}
    log_methods = ("log", "log_dict")
    overridden = {name: vars(module).pop(name) for name in log_methods if name in vars(module)}
    for name in log_methods:
        setattr(module, name, lambda *args, **kwargs: None)
    try:
        with torch.random.fork_rng([module.device] if module.device.type == "cuda" else []):
            yield
    finally:
        for name in log_methods:
            delattr(module, name)
        for name, function in overridden.items():
            setattr(module, name, function)
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(before[name])
        if (bins := getattr(module, "timestep_bins", None)) is not None:
            bins.pop()
        if isinstance(module, Stage):
            module.reset_step_losses()
