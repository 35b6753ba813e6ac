"""The evaluation command's numbers within training, of the averaged weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn

from wuerstchen_pl.evaluation.drawing import Process
from wuerstchen_pl.evaluation.plan import Plan
from wuerstchen_pl.evaluation.run import Subject, denoisers, evaluate
from wuerstchen_pl.pipeline.found import pipeline_of
from wuerstchen_pl.stages.c import StageC


class During(L.Callback):
    """Evaluate Stage C, or the baseline, now and then, and log ``eval/...``.

    What ``python -m wuerstchen_pl.evaluate`` finds for the checkpoint of the same step is found
    here: the same code draws and judges. Training goes on as if nothing had happened.

    Args:
        folder: each report gets a folder in it, ``step0001000``.
        every_steps: steps between two.
        plan: what to measure.
    """

    def __init__(self, *, folder: str, every_steps: int, plan: Plan) -> None:
        if every_steps < 1:
            raise ValueError(
                f"callbacks.evaluation.every_steps={every_steps} is out of range; use 1 or more"
            )
        self.folder, self.every_steps, self.plan = Path(folder), every_steps, plan
        self._seen_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See that there is something to draw with.

        Raises:
            ValueError: if another stage is trained, or from a cache.
        """
        self._seen_step = trainer.global_step
        if not isinstance(pl_module, StageC):
            raise ValueError(
                "callbacks=evaluated draws pictures, which takes Stage C; use callbacks=default "
                "for stage=a and stage=b"
            )
        if hasattr(trainer.datamodule, "made_with") and self.plan.of_data:  # type: ignore[attr-defined]
            raise ValueError(
                "callbacks=evaluated compares with training pictures, which data=cached has none "
                "of; name a folder with callbacks.evaluation.plan.reference and a file with "
                "callbacks.evaluation.plan.prompts"
            )

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Evaluate if it is time."""
        step = trainer.global_step
        if step % self.every_steps or step == self._seen_step:
            return
        self._seen_step = step
        assert isinstance(pl_module, StageC)
        name = type(pl_module).__name__.removeprefix("Stage").lower()
        process = Process(trainer.global_rank, trainer.world_size)
        with pl_module.ema.applied(pl_module), as_before(pl_module):
            subject = Subject(
                facts={"run": trainer.default_root_dir, "step": step},
                pipeline=pipeline_of(pl_module),
                stages=denoisers(name, pl_module.eval()),
                data=trainer.datamodule,  # type: ignore[attr-defined]
            )
            scores = evaluate(self.plan, subject, self.folder / f"step{step:07d}", process)
        trainer.strategy.barrier()
        if scores is not None:
            found = {f"eval/{name}": score.value for name, score in scores.items()}
            for logger in trainer.loggers:  # at once: Lightning's log waits for a logging step
                logger.log_metrics(found, step - 1)


@contextmanager
def as_before(module: nn.Module) -> Iterator[None]:
    """Put back what is in training mode, and what has gradients."""
    training = [(part, part.training) for part in module.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        yield
    finally:
        for part, mode in training:
            part.training = mode
        for parameter, needed in trained:
            parameter.requires_grad_(needed)
