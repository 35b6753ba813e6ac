"""The learning rate."""

import lightning as L
import torch


class LearningRate(L.Callback):
    """Log ``train/lr``, the learning rate of the step, with the training loss."""

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Log in steps for which Lightning writes logs, as the copy to a GPU waits for it."""
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log("train/lr", optimizer.param_groups[0]["lr"])
