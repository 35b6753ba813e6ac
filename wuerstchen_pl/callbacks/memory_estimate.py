"""The memory that training takes on each device, reported before the first step."""

import logging
import os
from collections.abc import Iterable

import lightning as L
import torch
from torch import Tensor, nn

from wuerstchen_pl.batch import Batch
from wuerstchen_pl.callbacks.step_profile import profile_step_once
from wuerstchen_pl.stages.stage import Stage

logger = logging.getLogger(__name__)

GB = 1e9


class MemoryEstimate(L.Callback):
    """Show the memory that a run needs on each device, and refuse one that cannot fit.

    Weights, gradients, EMA weights and frozen networks are counted; the optimizer state is two
    tensors a weight if it has betas, else one; activations, by a trial with a few samples, are what
    the forward pass of the first batch keeps for its backward pass. What operations take for a
    moment, and validation, are not in it: a fit within a tenth may still fail.

    Args:
        refuse: False shows the table alone.
    """

    def __init__(self, *, refuse: bool = True) -> None:
        self.refuse = refuse
        self._looked = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Look once.

        Raises:
            ValueError: if it cannot fit.
        """
        if self._looked:
            return
        self._looked = True
        needed = estimate_bytes(pl_module, trainer.optimizers[0], batch)
        total, there = sum(needed.values()), device_memory(pl_module.device, trainer.num_devices)
        of_sample = profile_step_once(pl_module, batch).saved_bytes_per_sample
        room = len(batch["caption"]) + int((there - total) // max(1, of_sample))
        if trainer.is_global_zero:
            parts = ", ".join(f"{name} {size / GB:.2f}" for name, size in needed.items())
            logger.info(
                "memory, GB of %.1f: %s; total %.2f; room for %d samples at once",
                there / GB, parts, total / GB, max(0, room),
            )  # fmt: skip
        # all together, as one that stopped would leave the others waiting
        short = torch.tensor(float(total > there), device=pl_module.device)
        if self.refuse and float(trainer.strategy.reduce(short, reduce_op="max")):
            most = max(needed, key=lambda name: needed[name])
            raise ValueError(
                f"training needs about {total / GB:.1f} GB on each device, most of it "
                f"{most}, and there are {there / GB:.1f}; set {_fitting(trainer, batch, room)}"
                "activation_checkpointing=true, stage.ema.device=cpu or trainer=fsdp, or "
                "check_memory=false to try it"
            )


def _fitting(trainer: L.Trainer, batch: Batch, room: int) -> str:
    """The largest batch that has room and makes the same step; nothing if none has."""
    # a batch lacks what could not be read
    data = getattr(trainer, "datamodule", None)
    rows = getattr(data, "batch_size", len(batch["caption"]))
    of_process = rows * trainer.accumulate_grad_batches
    fitting = [n for n in range(1, min(room, rows) + 1) if of_process % n == 0]
    if not fitting:
        return ""
    return f"data.batch_size={fitting[-1]} global_batch={of_process * trainer.world_size}, "


def estimate_bytes(
    module: L.LightningModule, optimizer: torch.optim.Optimizer, batch: Batch
) -> dict[str, int]:
    """Bytes on this device, by what they are for."""
    trained = _bytes(p for p in module.parameters() if p.requires_grad)
    state_copies = (2 if "betas" in optimizer.defaults else 1) * _bits(optimizer) / 32
    ema = getattr(module, "ema", None)
    averaged = ema is not None and ema.device is None
    return {
        "weights": _bytes(module.parameters()) + _bytes(module.buffers()),
        "frozen networks": _frozen(module),
        "gradients": trained,
        "optimizer": round(state_copies * trained),
        "ema": trained if averaged else 0,
        "activations": profile_step_once(module, batch).saved_bytes,
    }


def _bits(optimizer: torch.optim.Optimizer) -> int:
    """Of a moment of a weight: bitsandbytes' optimizers say 8."""
    return getattr(getattr(optimizer, "args", None), "optim_bits", 32)


def _frozen(module: nn.Module) -> int:
    """Bytes of a stage's frozen networks, and of theirs."""
    frozen = module.frozen.present().values() if isinstance(module, Stage) else ()
    return sum(_bytes(part.parameters()) + _frozen(part) for part in frozen)


def device_memory(device: torch.device, processes: int) -> int:
    """Bytes of a GPU, or a process's share of the host's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // max(1, processes)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of the parts that lie on this device."""
    return sum(getattr(t, "to_local", lambda t=t: t)().nbytes for t in tensors)
