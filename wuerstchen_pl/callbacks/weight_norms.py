"""The norms of the weights and of their updates."""

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class WeightNormMonitor(L.Callback):
    """Log ``train/param_norm`` and ``train/update_ratio``, the norm of an update over that norm.

    A ratio of about 1e-3 is usual; above 1e-2 the learning rate is too large. A measured step needs
    the memory of another copy of the weights.

    Args:
        every_steps: steps between two measurements. The first is at half of it, as Stage A
            restarts codes in every hundredth step.
    """

    def __init__(self, *, every_steps: int = 100) -> None:
        if every_steps < 1:
            raise ValueError(f"every_steps={every_steps} is out of range; use 1 or more")
        self.every_steps = every_steps
        self._before: list[Tensor] = []

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Copy the weights before a step that is measured."""
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
        """Compare the weights with their copy, and log."""
        if not self._before:
            return
        weights, updates = [p.detach() for p in pl_module.parameters()], self._before
        self._before = []
        torch._foreach_sub_(updates, weights)
        norm = _norm(weights)
        pl_module.log("train/param_norm", norm)
        pl_module.log("train/update_ratio", _norm(updates) / norm)


def _norm(tensors: list[Tensor]) -> Tensor:
    norm = nn.utils.get_total_norm(tensors)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
