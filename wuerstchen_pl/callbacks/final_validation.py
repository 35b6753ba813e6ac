"""A validation at the last step of a run, whatever the interval of the others."""

import lightning as L
from lightning.pytorch.utilities.types import STEP_OUTPUT


class FinalValidation(L.Callback):
    """Validate after the last step, also if ``validate_every_steps`` does not divide its number."""

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Request the end of training at its last step: Lightning then validates once more."""
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True
