"""The learning rates."""

import lightning as L
import torch


class LearningRate(L.Callback):
    """Log the learning rate of the step with the training loss.

    ``train/lr`` is that of the first parameter group, ``train/lr_text_encoder`` that of the group
    with this name. For Prodigy, it is its estimate.
    """

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Log in steps for which Lightning writes logs, as the copy to a GPU waits for it."""
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            for number, group in enumerate(optimizer.param_groups):
                name = f"train/lr_{group['name']}" if number else "train/lr"
                pl_module.log(name, group["lr"] * group.get("d", 1.0))
