"""A CSV log that survives resuming; Lightning's CSVLogger deletes the existing file."""

import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from wuerstchen_pl.io.atomic import write_text


class CSVLogger(Logger):
    """Append ``step,metric,value`` rows to ``metrics.csv``.

    When a resumed run first logs, the rows of steps that it repeats are dropped, as are malformed
    lines, such as the last line of a run that was killed.

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
        """Empty, as a run has a single log."""
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> Path:
        """The path of the CSV file."""
        return self.path

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing, as the run's config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one row per metric."""
        if not self._opened:
            self._open(step or 0)
        rows = [(step, name, f"{value:.6g}") for name, value in metrics.items() if name != "epoch"]
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:  # a single system call, so that no signal leaves half a row
            os.write(descriptor, _to_csv(rows).encode())
        finally:
            os.close(descriptor)

    def _open(self, step: int) -> None:
        rows = []
        if self.path.is_file():
            text = self.path.read_text("utf-8", errors="replace").replace("\0", "")
            rows = [
                row
                for row in csv.reader(text.splitlines())
                if len(row) == 3 and row[0].isdecimal() and int(row[0]) < step
            ]
        write_text(self.path, _to_csv([("step", "metric", "value"), *rows]))
        self._opened = True


def _to_csv(rows: Iterable[Iterable[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
