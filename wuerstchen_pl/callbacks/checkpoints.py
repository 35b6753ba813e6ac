"""Checkpoints every n steps and at the end, written atomically and with a hash."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import cast

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.types import STEP_OUTPUT

from wuerstchen_pl.checkpointing.async_save import DeferredSave
from wuerstchen_pl.io import atomic

_THREAD = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")


class Checkpoints(Checkpoint):
    """Write ``checkpoints/step0001000.ckpt`` under a run's folder, and keep the newest.

    Args:
        folder: folder of the checkpoints.
        every_steps: steps between two checkpoints.
        keep: number of newest checkpoints to keep.
        keep_every_steps: keep checkpoints at multiples of this step permanently; None keeps only
            the newest.
        async_save: copy the state to host memory, and write it while training continues.
    """

    def __init__(
        self,
        *,
        folder: str,
        every_steps: int,
        keep: int = 2,
        keep_every_steps: int | None = None,
        async_save: bool = False,
    ) -> None:
        if every_steps < 1 or keep < 1:
            raise ValueError(
                f"every_steps={every_steps} and keep={keep} are out of range; use 1 or more"
            )
        if keep_every_steps is not None and (
            keep_every_steps < 1 or keep_every_steps % every_steps
        ):
            raise ValueError(
                f"keep_every_steps={keep_every_steps} is not a multiple of "
                f"every_steps={every_steps}; use a multiple, or null"
            )
        self.folder, self.every_steps, self.keep = Path(folder), every_steps, keep
        self.keep_every_steps, self.async_save = keep_every_steps, async_save
        self.seconds = 0.0  # time that training waited for saving
        self._saved_step = -1
        self._writing: Future[None] | None = None
        self._group: dist.ProcessGroup | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Mark the step that the run starts or resumes from as saved."""
        self._saved_step = trainer.global_step
        if dist.is_initialized():  # a separate group, so that saving does not block training
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Log this step under its number.

        When Lightning resumes, it counts the last step once more, since a checkpoint that was saved
        during a step lacks it; one that was saved at the end of training has counted it.
        """
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Save every ``every_steps`` steps."""
        if trainer.global_step % self.every_steps == 0:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last step, however the run ended, and wait for its checkpoint."""
        self.save(trainer)
        self.finish()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Wait for the last checkpoint; the original exception is the one that is reported."""
        with suppress(Exception):
            self.finish()

    def save(self, trainer: L.Trainer) -> None:
        """Save now, or start to; every process must call it.

        Raises:
            OSError: if this checkpoint or the one before cannot be written; older ones are kept.
        """
        self.finish()
        step = trainer.global_step
        if step == self._saved_step:  # gradient accumulation: still the same step
            return
        start = time.perf_counter()
        path = self.folder / f"step{step:07d}.ckpt"
        temporary = path.with_suffix(".partial")
        deferred = DeferredSave(copy_to_host=self.async_save)
        trainer.save_checkpoint(temporary, storage_options=deferred)
        write = partial(self._write, deferred, path, temporary, trainer.is_global_zero)
        if self.async_save:
            self._writing = _THREAD.submit(_on_device, trainer.strategy.root_device, write)
        else:
            write()
        self._saved_step = step
        self.seconds += time.perf_counter() - start

    def finish(self) -> None:
        """Wait until the pending checkpoint is written; every process must call it.

        Raises:
            OSError: if it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(
        self, deferred: DeferredSave, path: Path, temporary: Path, is_global_zero: bool
    ) -> None:
        """Write and commit a checkpoint; no process returns before it is committed."""
        phases = (
            self._prepare_folder if is_global_zero else None,
            partial(deferred.write, self._group),
            partial(self._commit, temporary, path) if is_global_zero else None,
        )
        if reason := next(filter(None, (self._run_on_all(phase) for phase in phases)), None):
            with suppress(OSError):  # a disk that fails may not allow removal either
                atomic.remove(temporary)
            raise OSError(f"checkpoint {path} could not be written: {reason}")

    def _run_on_all(self, work: Callable[[], None] | None) -> str | None:
        """Run ``work`` on the processes that have any; returns the reason of a failure to all."""
        reason = None
        try:
            if work is not None:
                work()
        except OSError as error:
            reason = error.strerror or str(error)
        if self._group is None:
            return reason
        all_reasons: list[str | None] = [None] * self._group.size()
        dist.all_gather_object(all_reasons, reason, group=self._group)
        return next(filter(None, all_reasons), None)

    def _prepare_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob("*.partial"):  # of runs that were killed
            atomic.remove(leftover)

    def _commit(self, temporary: Path, path: Path) -> None:
        atomic.commit(temporary, path)
        self._remove_old()

    def newest(self) -> Path | None:
        """The newest checkpoint in the folder, or None."""
        return max(self.folder.glob("step*.ckpt"), default=None, key=lambda p: int(p.stem[4:]))

    def _remove_old(self) -> None:
        # Sort by number: names are padded to seven digits only.
        saved = sorted((int(p.stem[4:]), p) for p in self.folder.glob("step*.ckpt"))
        for step, old in saved[: -self.keep]:
            if not self.keep_every_steps or step % self.keep_every_steps:
                atomic.remove(old)


def _on_device(device: torch.device, work: Callable[[], None]) -> None:
    """Run ``work`` with ``device`` as the current one, which in a new thread is device 0."""
    with torch.accelerator.device_index(device.index):
        work()
