"""Checkpoints every n steps and at the end, each whole or not there at all, with its hash."""

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.types import STEP_OUTPUT

from wuerstchen_pl import durable


class Checkpoints(Checkpoint):
    """Write ``checkpoints/step0001000.ckpt`` under a run's folder, and keep the last few.

    Args:
        folder: where they go.
        every_steps: steps between two.
        keep: how many are kept.
    """

    def __init__(self, *, folder: str, every_steps: int, keep: int = 2) -> None:
        if every_steps < 1 or keep < 1:
            raise ValueError(
                f"checkpoint_every_steps={every_steps} and keep={keep} must be at least 1"
            )
        self.folder, self.every_steps, self.keep = Path(folder), every_steps, keep
        self._saved_step = -1

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Save if it is time, or the last step."""
        step = trainer.global_step
        if step % self.every_steps == 0 or step == trainer.max_steps:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        step = trainer.global_step
        if step == self._saved_step:  # gradient accumulation: the step has not moved
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step{step:07d}.ckpt"
        aside = path.with_suffix(".partial")
        try:
            trainer.save_checkpoint(aside)
            if trainer.is_global_zero:
                durable.publish(aside, path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            reason = error.strerror or error
            raise OSError(f"checkpoint {path} could not be written: {reason}") from error
        self._saved_step = step
        if trainer.is_global_zero:
            # by step: names have seven digits, and sort wrongly from ten million on
            saved = sorted(self.folder.glob("step*.ckpt"), key=lambda p: int(p.stem[4:]))
            for old in saved[: -self.keep]:
                durable.remove(old)
