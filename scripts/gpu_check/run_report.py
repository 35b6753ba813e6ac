"""What a training run of the programs section reports, by a callback of that run."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from scripts.gpu_check.syncs import SyncRecorder
from wuerstchen_pl.callbacks.memory_estimate import estimate_bytes


class RunReport(SyncRecorder):
    """Write the peak memory, its estimate, the compiled graphs and the synchronizations of a step.

    Compiled blocks that would run eagerly end the run.

    Args:
        path: the JSON file to write.
        step: number of completed steps at which to record synchronizations.
    """

    def __init__(self, *, path: str, step: int) -> None:
        super().__init__(step=step)
        self.path = Path(path)
        self.estimated_bytes = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse to run compiled blocks eagerly."""
        torch._dynamo.config.fail_on_recompile_limit_hit = True

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Estimate the memory at the first batch."""
        if not self.estimated_bytes:
            needed = estimate_bytes(pl_module, trainer.optimizers[0], batch)
            self.estimated_bytes = sum(needed.values())
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the report."""
        report = {
            "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
            "estimated_bytes": self.estimated_bytes,
            "graphs": counters["stats"]["unique_graphs"],
            "syncs": self.lines,
        }
        self.path.write_text(json.dumps(report))
