"""Checkpoints every n steps and at the end, each whole or not there at all, with its hash."""

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.types import STEP_OUTPUT

from wuerstchen_pl import durable


class Checkpoints(Checkpoint):
    """Write ``checkpoints/step0001000.ckpt`` under a run's folder, and keep the last few.

    Args:
        folder: where they go.
        every_steps: steps between two.
        keep: how many of the newest are kept.
        keep_every_steps: those of whole multiples of so many steps are kept for good; None keeps
            none of them.
    """

    def __init__(
        self, *, folder: str, every_steps: int, keep: int = 2, keep_every_steps: int | None = None
    ) -> None:
        if every_steps < 1 or keep < 1:
            raise ValueError(
                f"checkpoint_every_steps={every_steps} and keep={keep} must be at least 1"
            )
        if keep_every_steps is not None and (
            keep_every_steps < 1 or keep_every_steps % every_steps
        ):
            raise ValueError(
                f"callbacks.checkpoints.keep_every_steps={keep_every_steps} is no multiple of "
                f"checkpoint_every_steps={every_steps}; use one, or null"
            )
        self.folder, self.every_steps, self.keep = Path(folder), every_steps, keep
        self.keep_every_steps = keep_every_steps
        self.seconds = 0.0  # that saving took
        self._saved_step = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The step that a run begins or goes on with is not saved anew."""
        self._saved_step = trainer.global_step

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

    def save(self, trainer: L.Trainer) -> None:
        """Save now; all processes have to call it.

        Raises:
            OSError: if it cannot be written; those before are left as they are.
        """
        step = trainer.global_step
        if step == self._saved_step:  # gradient accumulation: the step has not moved
            return
        began = time.perf_counter()
        path = self.folder / f"step{step:07d}.ckpt"
        aside = path.with_suffix(".partial")
        # The others wait until it is published: one that ended before would have rank 0 killed.
        failed = (
            _first_does(trainer, self._make_room)
            or _all_write(trainer, aside)
            or _first_does(trainer, partial(self._publish, aside, path))
        )
        if failed:
            with suppress(OSError):  # the disk may be one that nothing can be removed from
                durable.remove(aside)
            raise OSError(f"checkpoint {path} could not be written: {failed}")
        self._saved_step = step
        self.seconds += time.perf_counter() - began

    def _make_room(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob("*.partial"):  # by runs that were killed
            durable.remove(left)

    def _publish(self, aside: Path, path: Path) -> None:
        durable.publish(aside, path)
        self._remove_old()

    def newest(self) -> Path | None:
        """The last checkpoint that was saved, by this process or one before it."""
        return max(self.folder.glob("step*.ckpt"), default=None, key=lambda p: int(p.stem[4:]))

    def _remove_old(self) -> None:
        # by step: names have seven digits, and sort wrongly from ten million on
        saved = sorted((int(p.stem[4:]), p) for p in self.folder.glob("step*.ckpt"))
        for step, old in saved[: -self.keep]:
            if not self.keep_every_steps or step % self.keep_every_steps:
                durable.remove(old)


def _first_does(trainer: L.Trainer, work: Callable[[], None]) -> str | None:
    """Let the first process do something, and all know why it failed, if it did."""
    failed = None
    if trainer.is_global_zero:
        try:
            work()
        except OSError as error:
            failed = error.strerror or str(error)
    return trainer.strategy.broadcast(failed)


def _all_write(trainer: L.Trainer, aside: Path) -> str | None:
    """Let each process write what it has to, and all know why it failed, if it did."""
    failed = None
    try:
        trainer.save_checkpoint(aside)
    except OSError as error:
        failed = error.strerror or str(error)
        trainer.strategy.barrier()  # where those wait that had nothing to write
    return trainer.strategy.broadcast(failed)
