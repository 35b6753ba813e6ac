"""Reports of how many samples were seen and skipped, and why, after each epoch."""

import logging
import time

import lightning as L

from wuerstchen_pl.plural import plural

logger = logging.getLogger(__name__)


class DataReport(L.Callback):
    """Log the data module's counts after each epoch, and report how many samples were skipped.

    Logs ``data/seen``, ``data/dropped/<filter>``, ``data/bad/<reason>`` and
    ``data/ignored/<reason>``, all counted since the run began, and ``data/cropped_share``, the
    fraction of pixels that cropping removed.

    Args:
        every_seconds: minimum time between two reports, as epochs may be short.
    """

    def __init__(self, *, every_seconds: float = 60.0) -> None:
        self.every_seconds = every_seconds
        self._reported_at = -float("inf")
        self._reported_total = 0.0

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the counts, and report the skipped samples."""
        counts = getattr(getattr(trainer, "datamodule", None), "counts", {})
        if not counts:
            return
        skipped = {
            k: v for k, v in counts.items() if k.startswith(("dropped/", "bad/", "ignored/"))
        }
        metrics = {"data/seen": counts.get("seen", 0)}
        metrics |= {f"data/{name}": number for name, number in skipped.items()}
        if counts.get("pixels"):
            metrics["data/cropped_share"] = 1 - counts["pixels/kept"] / counts["pixels"]
        pl_module.log_dict({k: float(v) for k, v in metrics.items()}, rank_zero_only=True)
        self._report(trainer, counts, skipped)

    def _report(
        self, trainer: L.Trainer, counts: dict[str, float], skipped: dict[str, float]
    ) -> None:
        now, total = time.monotonic(), sum(skipped.values())
        if not trainer.is_global_zero or total == self._reported_total:
            return
        if now - self._reported_at < self.every_seconds:
            return
        self._reported_at, self._reported_total = now, total
        parts = ", ".join(f"{number:.0f} {name}" for name, number in sorted(skipped.items()))
        seen = plural(int(counts["seen"]), "sample")
        logger.info("data: %s seen; skipped: %s", seen, parts)
