"""Checkpoints every n steps and at the end, each whole or not there at all, with its hash."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import cast

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.types import STEP_OUTPUT

from wuerstchen_pl.checkpointing.async_save import DeferredSave
from wuerstchen_pl.io import atomic

_THREAD = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")


class Checkpoints(Checkpoint):
    """Write ``checkpoints/step0001000.ckpt`` under a run's folder, and keep the last few.

    Args:
        folder: where they go.
        every_steps: steps between two.
        keep: how many of the newest are kept.
        keep_every_steps: those of whole multiples of so many steps are kept for good; None keeps
            none of them.
        async_save: copy what is saved into the host's memory, and train on while it is written.
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
                f"checkpoint_every_steps={every_steps} and keep={keep} must be at least 1"
            )
        if keep_every_steps is not None and (
            keep_every_steps < 1 or keep_every_steps % every_steps
        ):
            raise ValueError(
                f"callbacks.checkpoints.keep_every_steps={keep_every_steps} is not a multiple of "
                f"checkpoint_every_steps={every_steps}; use one, or null"
            )
        self.folder, self.every_steps, self.keep = Path(folder), every_steps, keep
        self.keep_every_steps, self.async_save = keep_every_steps, async_save
        self.seconds = 0.0  # that saving took
        self._saved_step = -1
        self._writing: Future[None] | None = None
        self._group: dist.ProcessGroup | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The step that a run starts or resumes at is not saved again."""
        self._saved_step = trainer.global_step
        if dist.is_initialized():  # a group of its own, which training does not wait for
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Save if it is time, or the last step."""
        step = trainer.global_step
        if step % self.every_steps == 0 or step == trainer.max_steps:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait for the last one."""
        self.finish()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Wait all the same; the earlier error is the one reported."""
        with suppress(Exception):
            self.finish()

    def save(self, trainer: L.Trainer) -> None:
        """Save now, or begin to; all processes have to call it.

        Raises:
            OSError: if it, or the one before, cannot be written; those before are left as they are.
        """
        self.finish()
        step = trainer.global_step
        if step == self._saved_step:  # gradient accumulation: the step has not moved
            return
        began = time.perf_counter()
        path = self.folder / f"step{step:07d}.ckpt"
        temporary = path.with_suffix(".partial")
        deferred = DeferredSave(copy_to_host=self.async_save)
        trainer.save_checkpoint(temporary, storage_options=deferred)
        write = partial(self._write, deferred, path, temporary, trainer.is_global_zero)
        if self.async_save:
            self._writing = _THREAD.submit(write)
        else:
            write()
        self._saved_step = step
        self.seconds += time.perf_counter() - began

    def finish(self) -> None:
        """Wait until what was begun is written; all processes have to call it.

        Raises:
            OSError: if it could not be.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, deferred: DeferredSave, path: Path, temporary: Path, first: bool) -> None:
        """Write and publish; the others wait until it is: one that ended would end the first."""
        steps = (
            self._make_room if first else None,
            partial(deferred.write, self._group),
            partial(self._publish, temporary, path) if first else None,
        )
        if failed := next(filter(None, (self._agreed(step) for step in steps)), None):
            with suppress(OSError):  # the disk may be one that nothing can be removed from
                atomic.remove(temporary)
            raise OSError(f"checkpoint {path} could not be written: {failed}")

    def _agreed(self, work: Callable[[], None] | None) -> str | None:
        """Let processes do something, and all know why it failed, if it did."""
        failed = None
        try:
            if work is not None:
                work()
        except OSError as error:
            failed = error.strerror or str(error)
        if self._group is None:
            return failed
        of_all: list[str | None] = [None] * self._group.size()
        dist.all_gather_object(of_all, failed, group=self._group)
        return next(filter(None, of_all), None)

    def _make_room(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob("*.partial"):  # by runs that were killed
            atomic.remove(left)

    def _publish(self, temporary: Path, path: Path) -> None:
        atomic.commit(temporary, path)
        self._remove_old()

    def newest(self) -> Path | None:
        """The last checkpoint that was saved, by this process or one before it."""
        return max(self.folder.glob("step*.ckpt"), default=None, key=lambda p: int(p.stem[4:]))

    def _remove_old(self) -> None:
        # by step: names have seven digits, and sort wrongly from ten million on
        saved = sorted((int(p.stem[4:]), p) for p in self.folder.glob("step*.ckpt"))
        for step, old in saved[: -self.keep]:
            if not self.keep_every_steps or step % self.keep_every_steps:
                atomic.remove(old)
