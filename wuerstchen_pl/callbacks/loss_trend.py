"""A warning about a training loss that has not moved."""

import logging
from statistics import median

import lightning as L
from lightning.pytorch.utilities.types import STEP_OUTPUT

logger = logging.getLogger(__name__)

MIN_READINGS = 20
"""Logged losses below which nothing is said."""
MOVED = 0.95
"""A loss that ends below this share of its first values has moved."""


class LossTrend(L.Callback):
    """Compare the logged losses of the first and the last tenth of a run, and warn at its end."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._read_step = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start with an empty record; a resumed run is compared from where it resumes."""
        self._losses, self._read_step = [], trainer.global_step

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Record the loss in steps that log, whose value the progress bar waits for too."""
        step = trainer.global_step
        if step == self._read_step or step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        self._read_step = step
        if (loss := trainer.callback_metrics.get("train/loss")) is not None:
            self._losses.append(float(loss))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warn if the loss has not moved."""
        if len(self._losses) < MIN_READINGS or not trainer.is_global_zero:
            return
        tenth = len(self._losses) // 10 + 1
        first, last = median(self._losses[:tenth]), median(self._losses[-tenth:])
        if last > MOVED * first:
            logger.warning(
                "warning: train/loss has not moved: %.4g in the first tenth of the run, %.4g in "
                "the last; try another stage.optimizer.lr, or a higher trainer.max_steps",
                *(first, last),
            )
