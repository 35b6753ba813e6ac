"""The norms of the weights and of their updates."""

import logging

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

logger = logging.getLogger(__name__)

USUAL_RATIOS = (3e-5, 3e-2)
"""Range of update ratios at the full learning rate; about 1e-3 is usual."""


class WeightNormMonitor(L.Callback):
    """Log ``train/param_norm`` and ``train/update_ratio``, the norm of an update over that norm.

    A ratio of about 1e-3 is usual. If two in a row are outside of ``USUAL_RATIOS``, divided by the
    schedule's factor on the learning rate, a warning names the key to change, once per run. A
    measured step needs the memory of another copy of the weights.

    Args:
        every_steps: steps between two measurements. The first is at half of it, as Stage A
            restarts codes in every hundredth step.
    """

    def __init__(self, *, every_steps: int = 100) -> None:
        if every_steps < 1:
            raise ValueError(f"every_steps={every_steps} is out of range; use 1 or more")
        self.every_steps = every_steps
        self._before: list[Tensor] = []
        self._lr = self._full_lr = 0.0
        self._unusual_in_a_row = 0

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Copy the weights before a step that is measured."""
        if (trainer.global_step + 1) % self.every_steps == self.every_steps // 2:
            self._before = [p.detach().clone() for p in _trained(pl_module)]
            group = optimizer.param_groups[0]
            self._lr, self._full_lr = group["lr"], group.get("initial_lr", group["lr"])

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
        weights, updates = [p.detach() for p in _trained(pl_module)], self._before
        self._before = []
        torch._foreach_sub_(updates, weights)
        norm = _norm(weights)
        pl_module.log("train/param_norm", norm)
        ratio = _norm(updates) / norm
        pl_module.log("train/update_ratio", ratio)
        self._warn(trainer, float(ratio))

    def _warn(self, trainer: L.Trainer, ratio: float) -> None:
        if self._lr <= 0:
            return
        at_full_rate = ratio * self._full_lr / self._lr
        low, high = USUAL_RATIOS
        is_usual = low <= at_full_rate <= high
        self._unusual_in_a_row = 0 if is_usual else self._unusual_in_a_row + 1
        if self._unusual_in_a_row == 2 and trainer.is_global_zero:
            logger.warning(
                "warning: train/update_ratio is %.1e, and about 1e-3 is usual; %s "
                "stage.optimizer.lr=%g",
                *(at_full_rate, "lower" if at_full_rate > high else "raise", self._full_lr),
            )


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _norm(tensors: list[Tensor]) -> Tensor:
    norm = nn.utils.get_total_norm(tensors)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
