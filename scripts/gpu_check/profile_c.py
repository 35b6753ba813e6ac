"""The costliest kernels of a training step of Stage C."""

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch.profiler import ProfilerActivity, profile

from scripts.gpu_check.rows import Row
from scripts.gpu_check.sizes import Check
from scripts.gpu_check.training import WARM_UP, Mode, measure_or_fail
from scripts.timing import wait_for_gpu
from wuerstchen_pl.plural import plural

TOP = 12
"""Kernels in the table; the file has all."""


class StepProfiler(L.Callback):
    """Profile the step after the warm-up."""

    def __init__(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self.profile = profile(activities=activities)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start."""
        if batch_idx == WARM_UP:
            self.profile.start()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stop."""
        if batch_idx == WARM_UP:
            wait_for_gpu()
            self.profile.stop()


def rows(check: Check) -> Iterator[Row]:
    """Shares of the time of the costliest operations; ``profile_c.txt`` has the whole table."""
    profiler = StepProfiler()
    batch, _ = check.size.stage_c_batches
    cost = measure_or_fail("c", Mode(batch), check.size, [profiler])
    if isinstance(cost, Row):
        yield cost
        return
    events = profiler.profile.key_averages()
    key = "self_cpu_time_total" if not torch.cuda.is_available() else "self_device_time_total"
    table = events.table(sort_by=key, row_limit=100, max_name_column_width=80)
    (check.out / "profile_c.txt").write_text(table)
    total = sum(getattr(event, key) for event in events)
    costliest = sorted(events, key=lambda event: getattr(event, key), reverse=True)[:TOP]
    for event in costliest:
        share = getattr(event, key) / total
        yield Row(event.key[:80], f"{share:.1%} in {plural(event.count, 'call')}")
