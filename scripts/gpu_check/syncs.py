"""Find the lines at which a training step waits for the GPU."""

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch

import wuerstchen_pl
from scripts.gpu_check.rows import Row, failed

MESSAGE = "called a synchronizing CUDA operation"
PACKAGE = Path(wuerstchen_pl.__file__).parent


@contextmanager
def record_syncs() -> Iterator[Counter[str]]:
    """Count, by line, the operations within the block that wait for the GPU.

    torch warns of each; other warnings are shown as usual. On a machine without CUDA nothing warns.
    """
    lines: Counter[str] = Counter()
    cuda = torch.cuda.is_available()
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=MESSAGE)
        show = warnings.showwarning

        def record(message: Any, *args: Any, **kwargs: Any) -> None:
            if MESSAGE in str(message):
                lines[calling_line()] += 1
            else:
                show(message, *args, **kwargs)

        warnings.showwarning = record
        if cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lines
        finally:
            if cuda:
                torch.cuda.set_sync_debug_mode("default")


def calling_line() -> str:
    """The innermost line of this package on the stack; of Lightning if there is none."""
    stack = traceback.extract_stack()[:-2]
    for folder in (f"{PACKAGE}/", "/lightning/"):
        frames = [frame for frame in stack if folder in frame.filename]
        if frames:
            path = Path(frames[-1].filename)
            name = path.relative_to(PACKAGE) if path.is_relative_to(PACKAGE) else path.name
            return f"{name}:{frames[-1].lineno} {frames[-1].line}"
    return f"{stack[-1].filename}:{stack[-1].lineno}"


class SyncRecorder(L.Callback):
    """Record the synchronizations of one step, from its batch to the next one's.

    This includes loading the next batch, copying it to the device and all callbacks that come
    before this one.

    Args:
        step: number of completed optimizer steps at which to record; losses should not be logged
            in that step, which takes a synchronization.
    """

    def __init__(self, *, step: int) -> None:
        self.step = step
        self.lines: Counter[str] | None = None
        """Line -> number of waits; None until the step comes."""
        self._recording = ExitStack()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start, or stop at the next batch."""
        self._recording.close()
        if trainer.global_step == self.step and self.lines is None:
            self.lines = self._recording.enter_context(record_syncs())

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stop, if training ended in the recorded step."""
        self._recording.close()


def sync_row(what: str, lines: dict[str, int] | None) -> Row:
    """Expect that no line of a step waits for the GPU."""
    if lines is None:
        return failed(what, RuntimeError("the recorded step was not reached"))
    measured = "; ".join(f"{count} x {line}" for line, count in lines.items()) or "none"
    return Row(what, measured, "none", not lines)
