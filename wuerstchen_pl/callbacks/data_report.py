"""What the data gave, and what was left out of them and why, at the end of an epoch."""

import logging
import time

import lightning as L

logger = logging.getLogger(__name__)


class DataReport(L.Callback):
    """Log the data module's counts after each epoch, and show what was left out.

    Logged are ``data/seen``, ``data/dropped/<filter>``, ``data/bad/<reason>``, all counted since
    the run began, and ``data/cropped_share``, the share of pixels that crops cut away.

    Args:
        every_seconds: least time between two that are shown, as epochs may be short.
    """

    def __init__(self, *, every_seconds: float = 60.0) -> None:
        self.every_seconds = every_seconds
        self._shown_at = -float("inf")
        self._shown = 0.0

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log, and show."""
        counts = getattr(getattr(trainer, "datamodule", None), "counts", {})
        if not counts:
            return
        left_out = {k: v for k, v in counts.items() if k.startswith(("dropped/", "bad/"))}
        logged = {"data/seen": counts.get("seen", 0)}
        logged |= {f"data/{name}": number for name, number in left_out.items()}
        if counts.get("pixels"):
            logged["data/cropped_share"] = 1 - counts["pixels/kept"] / counts["pixels"]
        pl_module.log_dict({k: float(v) for k, v in logged.items()}, rank_zero_only=True)
        self._show(trainer, counts, left_out)

    def _show(
        self, trainer: L.Trainer, counts: dict[str, float], left_out: dict[str, float]
    ) -> None:
        now, total = time.monotonic(), sum(left_out.values())
        if not trainer.is_global_zero or total == self._shown:
            return
        if now - self._shown_at < self.every_seconds:
            return
        self._shown_at, self._shown = now, total
        parts = ", ".join(f"{number:.0f} {name}" for name, number in sorted(left_out.items()))
        logger.info("data: %.0f samples seen; left out: %s", counts["seen"], parts)
