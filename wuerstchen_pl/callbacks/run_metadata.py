"""``run.json``: the versions, hardware and duration of a run."""

import json
import platform
import time
from pathlib import Path
from typing import cast

import lightning as L
import torch

from wuerstchen_pl.io.atomic import write_text
from wuerstchen_pl.io.versions import installed_versions
from wuerstchen_pl.stages.stage import Stage


class RunMetadata(L.Callback):
    """Write versions, hardware, parameter counts, steps and hours; hours add up over resumes.

    Args:
        folder: the run's folder.
    """

    def __init__(self, *, folder: str) -> None:
        self.path = Path(folder) / "run.json"
        self._hours_before = 0.0
        self._start = 0.0

    def state_dict(self) -> dict[str, float]:
        """The hours so far, for the checkpoint."""
        return {"hours": self._hours()}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Restore the hours of the run before it was resumed."""
        self._hours_before = state_dict["hours"]

    def _hours(self) -> float:
        return self._hours_before + (time.monotonic() - self._start) / 3600 if self._start else 0.0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._start = time.monotonic()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write ``run.json``."""
        if not trainer.is_global_zero:
            return
        cuda = torch.cuda.is_available()
        metadata = {
            "stage": cast(Stage, pl_module).name,
            "steps": trainer.global_step,
            "hours": round(self._hours(), 4),
            "parameters": sum(p.numel() for p in pl_module.parameters()),
            "trained_parameters": sum(p.numel() for p in pl_module.parameters() if p.requires_grad),
            "devices": trainer.num_devices * trainer.num_nodes,
            "hardware": torch.cuda.get_device_name() if cuda else platform.processor() or "CPU",
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "versions": installed_versions(("torch", "lightning", "wuerstchen_pl")),
        }
        write_text(self.path, json.dumps(metadata, indent=2) + "\n")
