"""A CSV log that survives a resume: Lightning's CSVLogger deletes the file of the run before it."""

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only


class CSVLogger(Logger):
    """Append ``step,metric,value`` rows to ``metrics.csv``.

    Rows of steps that a resumed run does again are dropped when it first logs.

    Args:
        folder: the run's folder.
    """

    def __init__(self, *, folder: str) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._opened = False

    @property
    def name(self) -> str:
        """The logger's name, for Lightning."""
        return "csv"

    @property
    def version(self) -> str:
        """A run has one log."""
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> Path:
        """The file."""
        return self.path

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one row per metric."""
        if not self._opened:
            self._open(step or 0)
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerows(
                (step, name, f"{value:.6g}") for name, value in metrics.items() if name != "epoch"
            )

    def _open(self, step: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = []
        if self.path.is_file():
            with self.path.open(newline="") as file:
                rows = [r for r in csv.reader(file) if r[0].isdigit() and int(r[0]) < step]
        with self.path.open("w", newline="") as file:
            csv.writer(file).writerows([("step", "metric", "value"), *rows])
        self._opened = True
