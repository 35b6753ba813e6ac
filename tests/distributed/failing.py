"""Callbacks that break one process only."""

from itertools import count
from pathlib import Path

import lightning as L

from wuerstchen_pl.data.sources.source import Sample

MESSAGE = "this process fails alone"


class FailOnRankOne(L.Callback):
    """Raise in the second step of rank 1, while rank 0 goes into the next all-reduce."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: object) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 1:
            raise ValueError(MESSAGE)


class UnreadableOnRankOne(L.Callback):
    """Let rank 1 read only every other image; write the error of each rank to a file."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        source, calls = trainer.datamodule.source, count()  # type: ignore[attr-defined]
        read = source.read

        def read_every_other(sample: Sample) -> bytes:
            if next(calls) % 2:
                raise OSError("this process cannot read it")
            return read(sample)

        if trainer.global_rank == 1:
            source.read = read_every_other

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        (self.folder / f"error-{trainer.global_rank}").write_text(str(exception))
