"""A callback that fails on one process only."""

import lightning as L

MESSAGE = "this process fails alone"


class FailOnRankOne(L.Callback):
    """Raise in the second step of rank 1, while rank 0 goes into the next all-reduce."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: object) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 1:
            raise ValueError(MESSAGE)
