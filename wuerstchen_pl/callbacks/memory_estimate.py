"""An estimate of the memory that training needs on each device, before the first step."""

import logging
import os
from collections.abc import Iterable
from typing import Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from wuerstchen_pl.batch import Batch
from wuerstchen_pl.callbacks.step_profile import forget_profile, profile_step_once
from wuerstchen_pl.models.activations import checkpoint_activations
from wuerstchen_pl.plural import plural
from wuerstchen_pl.stages import schedule_free
from wuerstchen_pl.stages.stage import Stage

logger = logging.getLogger(__name__)

GB = 1e9
HOST_EMA_STEPS = 100
"""Steps between updates of EMA weights in host memory."""


class MemoryEstimate(L.Callback):
    """Report the memory that a run needs on each device, and refuse a run that cannot fit.

    Weights, gradients, EMA weights and the frozen networks that a step uses are counted exactly.
    The optimizer state per byte is measured on a small weight. Activations are the tensors that the
    forward pass of the first batch saves for the backward pass, measured on a few samples.
    Temporary buffers and validation, which also uses the other frozen networks, are not included,
    so that a run within 10 % of the limit may still fail.

    Args:
        refuse: False only reports.
        activation_checkpointing: ``auto`` switches it on if the first batch would otherwise take
            more than 90 % of the memory, which does not change gradients; a bool is the choice
            that the run was started with.
    """

    def __init__(
        self, *, refuse: bool = True, activation_checkpointing: bool | Literal["auto"] = False
    ) -> None:
        self.refuse, self.is_auto = refuse, activation_checkpointing == "auto"
        self._done = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Estimate the memory at the first batch.

        Raises:
            ValueError: if it does not fit.
        """
        if self._done:
            return
        self._done = True
        available = device_memory(pl_module.device, trainer.num_devices)
        needed = estimate_bytes(pl_module, trainer.optimizers[0], batch)
        tight = sum(needed.values()) > 0.9 * available
        if self.is_auto and _on_any_process(trainer, tight):
            checkpoint_activations(pl_module)
            forget_profile(pl_module)
            needed = estimate_bytes(pl_module, trainer.optimizers[0], batch)
            if trainer.is_global_zero:
                logger.info("activation checkpointing is on, as the batch needs it to fit")
        total = sum(needed.values())
        bytes_per_sample = profile_step_once(pl_module, batch).saved_bytes_per_sample
        max_rows = len(batch["caption"]) + int((available - total) // max(1, bytes_per_sample))
        if trainer.is_global_zero:
            parts = ", ".join(f"{name} {size / GB:.2f}" for name, size in needed.items())
            logger.info(
                "memory, GB of %.1f: %s; total %.2f; a batch of %s fits",
                available / GB, parts, total / GB, plural(max(0, max_rows), "sample"),
            )  # fmt: skip
        if self.refuse and _on_any_process(trainer, total > available):
            largest = max(needed, key=lambda name: needed[name])
            raise ValueError(
                f"training needs about {total / GB:.1f} GB on each device, most of it for "
                f"{largest}, and {available / GB:.1f} GB are available; set "
                f"{_how_to_fit(trainer, pl_module, batch, max_rows)} or trainer=fsdp, or "
                "check_memory=false to try it; dry_run=true lists what fits"
            )


def _on_any_process(trainer: L.Trainer, condition: bool) -> bool:
    """Whether a condition holds on any process: one that stopped alone would leave others waiting.

    Every process must call it.
    """
    value = torch.tensor(float(condition), device=trainer.strategy.root_device)
    return bool(trainer.strategy.reduce(value, reduce_op="max"))


def _how_to_fit(trainer: L.Trainer, module: L.LightningModule, batch: Batch, max_rows: int) -> str:
    """Overrides that take less memory."""
    # not the length of the batch, which may lack unreadable samples
    data = getattr(trainer, "datamodule", None)
    rows = getattr(data, "batch_size", len(batch["caption"]))
    rows_per_step = rows * trainer.accumulate_grad_batches
    smaller = smaller_batch(rows, rows_per_step, max_rows, trainer.world_size)
    choices = (smaller, "activation_checkpointing=true", ema_on_host(module))
    return ", ".join(filter(None, choices))


def smaller_batch(rows: int, rows_per_step: int, max_rows: int, processes: int = 1) -> str:
    """Overrides for the largest batch that fits with the same optimizer step; empty if none does.

    Args:
        rows: samples of the batch on each process.
        rows_per_step: samples of an optimizer step on each process.
        max_rows: samples that fit.
        processes: number of processes.
    """
    fitting = [n for n in range(1, min(max_rows, rows) + 1) if rows_per_step % n == 0]
    if not fitting:
        return ""
    return f"data.batch_size={fitting[-1]} global_batch={rows_per_step * processes}"


def ema_on_host(module: L.LightningModule) -> str:
    """Overrides that keep the EMA weights in host memory; updates are rare, as each copies all."""
    ema = getattr(module, "ema", None)
    if ema is None or ema.device is not None:
        return ""
    overrides = "stage.ema.device=cpu"
    if ema.every_steps < HOST_EMA_STEPS:
        decay = ema.decay ** (HOST_EMA_STEPS / ema.every_steps)
        overrides += f" stage.ema.every_steps={HOST_EMA_STEPS} stage.ema.decay={decay:.3g}"
    return overrides


def estimate_bytes(
    module: L.LightningModule, optimizer: torch.optim.Optimizer, batch: Batch
) -> dict[str, int]:
    """Bytes on this device by purpose."""
    # first, as the step moves the frozen networks that it uses to the device
    activations = profile_step_once(module, batch).saved_bytes
    trainable = _bytes(p for p in module.parameters() if p.requires_grad)
    ema = getattr(module, "ema", None)
    has_ema = ema is not None and ema.device is None
    accumulates = module.trainer.accumulate_grad_batches > 1
    return {
        "weights": _bytes(module.parameters()) + _bytes(module.buffers()),
        "frozen networks": _frozen_bytes(module, next(module.parameters()).device),
        # each process keeps those of sharded weights whole until the last micro-batch
        "gradients": trainable + accumulates * _sharded_bytes(module.parameters()),
        "optimizer": round(state_bytes_per_byte(optimizer) * trainable),
        "ema": trainable if has_ema else 0,
        "activations": activations,
    }


def state_bytes_per_byte(optimizer: torch.optim.Optimizer) -> float:
    """Bytes of an optimizer's state per byte of the weights, measured on a weight of 256 x 256."""
    weight = nn.Parameter(torch.ones(256, 256))
    weight.grad = torch.ones_like(weight)
    probe = type(optimizer)([weight])  # type: ignore[call-arg]
    schedule_free.prepare(probe)
    probe.step()
    state = (t for t in probe.state[weight].values() if isinstance(t, Tensor) and t.numel() > 1)
    return _bytes(state) / weight.nbytes


def _frozen_bytes(module: nn.Module, device: torch.device) -> int:
    """Bytes on a device of a stage's frozen networks, including those nested in frozen stages."""
    frozen = module.frozen.present().values() if isinstance(module, Stage) else ()
    return sum(
        _bytes(p for p in part.parameters() if p.device == device) + _frozen_bytes(part, device)
        for part in frozen
    )


def device_memory(device: torch.device, processes: int) -> int:
    """Bytes of a GPU's memory, or of a process's share of the host memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // max(1, processes)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; for sharded ones, of the local shards."""
    return sum(getattr(t, "to_local", lambda t=t: t)().nbytes for t in tensors)


def _sharded_bytes(parameters: Iterable[Tensor]) -> int:
    """Bytes of the full tensors of trainable weights that are sharded."""
    return sum(p.nbytes for p in parameters if p.requires_grad and isinstance(p, DTensor))
