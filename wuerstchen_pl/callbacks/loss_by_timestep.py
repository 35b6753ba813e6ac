"""The loss by bands of t, logged and drawn."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from PIL import Image, ImageDraw, ImageFont

KEPT = 12  # readings in a chart


class LossByTimestep(L.Callback):
    """Log ``train/loss_t0.05`` and so on, a band's middle each, and draw ``loss_by_t.png``.

    A stage without times has no bands, and nothing is drawn.

    Args:
        folder: the run's folder.
        every_steps: steps that a reading covers.
    """

    def __init__(self, *, folder: str, every_steps: int = 500) -> None:
        if every_steps < 1:
            raise ValueError(f"every_steps={every_steps} is out of range; use 1 or more")
        self.path, self.every_steps = Path(folder) / "loss_by_t.png", every_steps
        self.readings: list[tuple[int, list[float]]] = []
        self._read_step = 0

    def state_dict(self) -> dict[str, Any]:
        """What the chart shows, for the checkpoint."""
        return {"readings": self.readings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the bins."""
        self.readings = [(step, list(means)) for step, means in state_dict["readings"]]

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Read, log and draw, now and then."""
        bands, step = getattr(pl_module, "timestep_bins", None), trainer.global_step
        if bands is None or step % self.every_steps or step == self._read_step:
            return
        self._read_step = step
        sums, counts = trainer.strategy.reduce(bands.pop(), reduce_op="sum")
        means = torch.where(counts > 0, sums / counts, torch.nan).tolist()
        known = {bin_center(i, len(means)): mean for i, mean in enumerate(means) if mean == mean}
        pl_module.log_dict({f"train/loss_t{t:.2f}": mean for t, mean in known.items()})
        self.readings = [*self.readings, (step, means)][-KEPT:]
        if trainer.is_global_zero:
            plot_losses(self.readings).save(self.path)


def bin_center(band: int, bands: int) -> float:
    """The t in the middle of a band."""
    return (band + 0.5) / bands


def plot_losses(readings: list[tuple[int, list[float]]]) -> Image.Image:
    """A line for each reading over t, older ones paler."""
    width, height, left, bottom, top = 520, 260, 60, 34, 28
    canvas = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=12)
    across, up = width - left - 16, height - bottom - top
    most = max((m for _, means in readings for m in means if m == m), default=1.0) or 1.0

    def place(i: int, means: list[float]) -> tuple[float, float]:
        return left + across * bin_center(i, len(means)), top + up * (1 - means[i] / most)

    for age, (_, means) in zip(range(len(readings) - 1, -1, -1), readings, strict=True):
        pale = round(200 * age / max(1, len(readings) - 1))
        points = [place(i, means) for i, mean in enumerate(means) if mean == mean]
        pen.line(points, fill=(30 + pale, 60 + pale * 3 // 4, 140 + pale // 2), width=2)
    pen.line([left, top + up, left + across, top + up], fill="black")
    for t in (0.0, 0.5, 1.0):
        pen.text((left + across * t, top + up + 6), f"{t:g}", fill="black", font=font, anchor="mt")
    for value in (0.0, most):
        at = (left - 6, top + up * (1 - value / most))
        pen.text(at, f"{value:.3g}", fill="black", font=font, anchor="rm")
    first, last = readings[0][0], readings[-1][0]
    pen.text((left, 6), f"loss over t, steps {first} (pale) to {last}", fill="black", font=font)
    return canvas
