"""One progress bar for a run: its steps, rate, time left and loss."""

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.types import STEP_OUTPUT
from tqdm import tqdm


class StepProgress(ProgressBar):
    """A bar over ``trainer.max_steps``; Lightning's own bar restarts with every epoch."""

    def __init__(self, *, label: str = "train") -> None:
        super().__init__()
        self.label = label
        self._bar: tqdm | None = None
        self._enabled = True

    def disable(self) -> None:
        """Hide the bar; Lightning calls it on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar."""
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar at the step where the run resumes."""
        self._bar = tqdm(
            total=trainer.max_steps if trainer.max_steps > 0 else None,
            initial=trainer.global_step,
            desc=self.label,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5,
            disable=not self._enabled,
        )

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Advance the bar, and show the loss and the last validation metrics."""
        if self._bar is None or trainer.global_step == self._bar.n:
            return
        self._bar.update(trainer.global_step - self._bar.n)
        # reading the loss waits for the device, as logging does in this step
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            names = ("train/loss", "val/loss", "val/psnr")
            values = trainer.callback_metrics
            postfix = {n: f"{float(values[n]):.4g}" for n in names if n in values}
            self._bar.set_postfix(postfix, refresh=False)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Close the bar, so that the error message starts on a new line."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
