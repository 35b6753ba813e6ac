"""Skip and count optimizer steps with non-finite gradients; too many in a row end the run."""

from typing import cast

import lightning as L
import torch
from torch import Tensor, nn

from wuerstchen_pl.callbacks.checkpoints import Checkpoints
from wuerstchen_pl.stages.stage import Stage


class SkipNonFiniteGrads(L.Callback):
    """Discard the gradients of a step if any is NaN or infinite.

    The optimizer then changes neither weights nor its state, and buffers, such as batch-norm
    statistics, are restored to their values before the step. The step still counts for schedules
    and data.

    Args:
        max_in_a_row: number of consecutive skipped steps that ends the run.

    Raises:
        ValueError: if ``max_in_a_row`` is below 1.
    """

    def __init__(self, *, max_in_a_row: int = 20) -> None:
        if max_in_a_row < 1:
            raise ValueError(f"max_in_a_row={max_in_a_row} is out of range; use 1 or more")
        self.max_in_a_row = max_in_a_row
        self.skipped = 0
        self._in_a_row = 0
        self._step = -1
        self._buffers: list[Tensor] = []

    def state_dict(self) -> dict[str, int]:
        """The number of skipped steps."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore the number of skipped steps."""
        self.skipped = state_dict["skipped"]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Copy the buffers before the first micro-batch of a step."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        buffers = _floating_buffers(pl_module)
        if len(self._buffers) != len(buffers) or any(
            a.device != b.device for a, b in zip(self._buffers, buffers, strict=True)
        ):
            self._buffers = [b.clone() for b in buffers]
        elif buffers:
            torch._foreach_copy_(self._buffers, buffers)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Check the gradient norms, which are the same on all processes.

        They are computed once per step, and reused for clipping. Reading them is the only
        synchronization with the device per step, as the host decides whether to step.

        Raises:
            ValueError: if too many steps were skipped in a row.
        """
        stage = cast(Stage, pl_module)
        norms = torch.stack(stage.gradient_norms(optimizer))
        if norms.isfinite().all():
            self._in_a_row = 0
            return
        stage.discard_gradients()
        with torch.no_grad():
            for buffer, saved in zip(_floating_buffers(stage), self._buffers, strict=True):
                buffer.copy_(saved)
        self.skipped += 1
        self._in_a_row += 1
        stage.log("train/skipped_steps", float(self.skipped))
        if self._in_a_row >= self.max_in_a_row:
            raise ValueError(
                f"{self._in_a_row} steps in a row had non-finite gradients, up to step "
                f"{trainer.global_step}; {_last_checkpoint(trainer)}. Lower stage.optimizer.lr, "
                "set trainer.gradient_clip_val=1.0, or train with trainer.precision=32-true"
            )


def _floating_buffers(module: nn.Module) -> list[Tensor]:
    return [b.detach() for b in module.buffers() if b.is_floating_point()]


def _last_checkpoint(trainer: L.Trainer) -> str:
    """A clause that names the checkpoint to resume from."""
    saved = [c.newest() for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoints)]
    if not saved or saved[0] is None:
        return "no checkpoint was saved before that"
    return f"the last checkpoint is {saved[0]}, and its weights are finite"
