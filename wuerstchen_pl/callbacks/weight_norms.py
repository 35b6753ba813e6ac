"""How large the weights are, and how far a step moves them."""

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class WeightNormMonitor(L.Callback):
    """Log ``train/param_norm``, and ``train/update_ratio``, the norm of a step's change over it.

    A ratio about 1e-3 is usual; beyond 1e-2 the learning rate is too large. The step that is
    measured needs the memory of one more copy of the weights.

    Args:
        every_steps: steps between two that are measured. Half of it is the first, as Stage A moves
            codes in every hundredth.
    """

    def __init__(self, *, every_steps: int = 100) -> None:
        if every_steps < 1:
            raise ValueError(f"every_steps={every_steps} is out of range; use 1 or more")
        self.every_steps = every_steps
        self._before: list[Tensor] = []

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Keep what the weights are."""
        if (trainer.global_step + 1) % self.every_steps == self.every_steps // 2:
            self._before = [p.detach().clone() for p in pl_module.parameters()]

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Compare, and log."""
        if not self._before:
            return
        now, moved = [p.detach() for p in pl_module.parameters()], self._before
        self._before = []
        torch._foreach_sub_(moved, now)
        size = _norm(now)
        pl_module.log("train/param_norm", size)
        pl_module.log("train/update_ratio", _norm(moved) / size)


def _norm(tensors: list[Tensor]) -> Tensor:
    norm = nn.utils.get_total_norm(tensors)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
