"""The loss binned by diffusion time t, logged and plotted."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from PIL import Image, ImageDraw, ImageFont

MAX_READINGS = 12
"""Readings in a plot."""


class LossByTimestep(L.Callback):
    """Log ``train/loss_t0.05`` etc., named by the bins' centers, and plot ``loss_by_t.png``.

    Does nothing for a stage without diffusion times.

    Args:
        folder: the run's folder.
        every_steps: steps that are averaged in one reading.
    """

    def __init__(self, *, folder: str, every_steps: int = 500) -> None:
        if every_steps < 1:
            raise ValueError(f"every_steps={every_steps} is out of range; use 1 or more")
        self.path, self.every_steps = Path(folder) / "loss_by_t.png", every_steps
        self.readings: list[tuple[int, list[float]]] = []
        self._read_step = 0

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
        bins, step = getattr(pl_module, "timestep_bins", None), trainer.global_step
        if bins is None or step % self.every_steps or step == self._read_step:
            return
        self._read_step = step
        sums, counts = trainer.strategy.reduce(bins.pop(), reduce_op="sum")
        means = torch.where(counts > 0, sums / counts, torch.nan).tolist()
        by_time = {bin_center(i, len(means)): mean for i, mean in enumerate(means) if mean == mean}
        pl_module.log_dict({f"train/loss_t{t:.2f}": mean for t, mean in by_time.items()})
        self.readings = [*self.readings, (step, means)][-MAX_READINGS:]
        if trainer.is_global_zero:
            plot_losses(self.readings).save(self.path)


def bin_center(index: int, num_bins: int) -> float:
    """The t at the center of a bin."""
    return (index + 0.5) / num_bins


def plot_losses(readings: list[tuple[int, list[float]]]) -> Image.Image:
    """One line over t per reading, older ones paler."""
    width, height, left, bottom, top = 520, 260, 60, 34, 28
    canvas = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=12)
    plot_width, plot_height = width - left - 16, height - bottom - top
    baseline = top + plot_height
    highest = max((m for _, means in readings for m in means if m == m), default=1.0) or 1.0

    def point(i: int, means: list[float]) -> tuple[float, float]:
        x = left + plot_width * bin_center(i, len(means))
        return x, top + plot_height * (1 - means[i] / highest)

    for age, (_, means) in zip(range(len(readings) - 1, -1, -1), readings, strict=True):
        pale = round(200 * age / max(1, len(readings) - 1))
        points = [point(i, means) for i, mean in enumerate(means) if mean == mean]
        draw.line(points, fill=(30 + pale, 60 + pale * 3 // 4, 140 + pale // 2), width=2)
    draw.line([left, baseline, left + plot_width, baseline], fill="black")
    for t in (0.0, 0.5, 1.0):
        x = left + plot_width * t
        draw.text((x, baseline + 6), f"{t:g}", fill="black", font=font, anchor="mt")
    for value in (0.0, highest):
        y = top + plot_height * (1 - value / highest)
        draw.text((left - 6, y), f"{value:.3g}", fill="black", font=font, anchor="rm")
    first, last = readings[0][0], readings[-1][0]
    draw.text((left, 6), f"loss over t, steps {first} (pale) to {last}", fill="black", font=font)
    return canvas
