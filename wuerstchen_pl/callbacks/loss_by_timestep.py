"""The loss binned by diffusion time t, logged and plotted."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_READINGS = 12
"""Readings in a plot."""


class LossByTimestep(L.Callback):
    """Log ``train/loss_t0.05`` etc., named by the bins' centers, and plot ``loss_by_timestep.png``.

    Does nothing for a stage without diffusion times. The last plot is at the end of the run.

    Args:
        folder: the run's folder.
        every_steps: steps that are averaged in one reading.
    """

    def __init__(self, *, folder: str, every_steps: int = 500) -> None:
        if every_steps < 1:
            raise ValueError(f"every_steps={every_steps} is out of range; use 1 or more")
        self.path, self.every_steps = Path(folder) / "loss_by_timestep.png", every_steps
        self.readings: list[tuple[int, list[float]]] = []
        self._read_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Mark the step that the run starts or resumes from as read."""
        self._read_step = trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """The plotted readings, for the checkpoint."""
        return {"readings": self.readings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the readings."""
        self.readings = [(step, list(means)) for step, means in state_dict["readings"]]

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Log and plot every ``every_steps`` steps."""
        if trainer.global_step % self.every_steps:
            return
        means = self._read(trainer, pl_module)
        by_time = {bin_center(i, len(means)): mean for i, mean in enumerate(means) if mean == mean}
        pl_module.log_dict({f"train/loss_t{t:.2f}": mean for t, mean in by_time.items()})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Plot the steps since the last reading."""
        self._read(trainer, pl_module)

    def _read(self, trainer: L.Trainer, pl_module: L.LightningModule) -> list[float]:
        """Read and plot the mean losses of all bins; empty if this step was read before."""
        bins, step = getattr(pl_module, "timestep_bins", None), trainer.global_step
        if bins is None or step == self._read_step:
            return []
        self._read_step = step
        sums, counts = trainer.strategy.reduce(bins.pop(), reduce_op="sum")
        means: list[float] = torch.where(counts > 0, sums / counts, torch.nan).tolist()
        self.readings = [*self.readings, (step, means)][-MAX_READINGS:]
        if trainer.is_global_zero:
            plot_losses(self.readings).savefig(self.path)
        return means


def bin_center(index: int, num_bins: int) -> float:
    """The t at the center of a bin."""
    return (index + 0.5) / num_bins


def plot_losses(readings: list[tuple[int, list[float]]]) -> "Figure":
    """One line over t per reading, older ones paler."""
    from matplotlib.figure import Figure  # takes a third of a second

    figure = Figure(figsize=(5.2, 2.6), layout="constrained")
    axes = figure.subplots()
    for number, (_, means) in enumerate(readings, 1):
        times = [bin_center(i, len(means)) for i in range(len(means))]
        shade = 0.15 + 0.85 * number / len(readings)
        axes.plot(times, means, color="tab:blue", alpha=shade)
    axes.set(xlabel="t", ylabel="loss", ylim=(0, None))
    first, last = readings[0][0], readings[-1][0]
    axes.set_title(f"loss over t, steps {first} (pale) to {last}")
    return figure
