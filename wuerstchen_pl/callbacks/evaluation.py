"""The evaluation command's numbers within training, of the averaged weights."""

import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

from wuerstchen_pl.callbacks.checkpoints import Checkpoints
from wuerstchen_pl.distributed.launch import DistInfo
from wuerstchen_pl.evaluation.image_folder import ImageFolder
from wuerstchen_pl.evaluation.metrics.score import Score
from wuerstchen_pl.evaluation.plan import EvaluationPlan
from wuerstchen_pl.evaluation.run import (
    EvalTarget,
    check_plan,
    evaluate,
    num_images,
    reference_images,
    stages_with_loss,
)
from wuerstchen_pl.pipelines.loading import pipeline_from_stage
from wuerstchen_pl.stages.c import StageC


class EvaluationCallback(L.Callback):
    """Save, evaluate Stage C, or the baseline, now and then, and log ``eval/...``.

    What ``python -m wuerstchen_pl.evaluate`` finds for the checkpoint of the same step is found
    here: the same code generates and measures. The training is not affected.

    Args:
        folder: each report gets a folder in it, ``step0001000``.
        every_steps: steps between two.
        plan: what to measure.
    """

    def __init__(self, *, folder: str, every_steps: int, plan: EvaluationPlan) -> None:
        if every_steps < 1:
            raise ValueError(
                f"callbacks.evaluation.every_steps={every_steps} is out of range; use 1 or more"
            )
        self.folder, self.every_steps, self.plan = Path(folder), every_steps, plan
        self.seconds = 0.0  # that it took
        self._seen_step = 0
        self._kept: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See that there is something to draw with.

        Raises:
            ValueError: if another stage is trained, or from a cache, or what is to be drawn could
                not be measured.
        """
        self._seen_step = trainer.global_step
        if not isinstance(pl_module, StageC):
            raise ValueError(
                "callbacks=with_evaluation draws images, which takes Stage C; use "
                "callbacks=default for stage=a and stage=b"
            )
        if hasattr(trainer.datamodule, "made_with") and self.plan.needs_data:  # type: ignore[attr-defined]
            raise ValueError(
                "callbacks=with_evaluation compares with training images, which data=cached has "
                "none of; name a folder with callbacks.evaluation.plan.reference and a file with "
                "callbacks.evaluation.plan.prompts"
            )
        subject = EvalTarget(facts={}, data=trainer.datamodule)  # type: ignore[attr-defined]
        others = [ImageFolder(Path(each), key="baselines") for each in self.plan.baselines]
        check_plan(self.plan, num_images(self.plan), reference_images(self.plan, subject), others)

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
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoints):
                callback.save(trainer)  # it may take long, and a signal waits for its end
        began = time.perf_counter()
        scores = self._evaluated(trainer, pl_module)
        trainer.strategy.barrier()
        self.seconds += time.perf_counter() - began
        if scores is not None:
            found = {f"eval/{name}": score.value for name, score in scores.items()}
            for logger in trainer.loggers:  # at once: Lightning's log waits for a logging step
                logger.log_metrics(found, step - 1)

    def _evaluated(self, trainer: L.Trainer, stage: Any) -> dict[str, Score] | None:
        """The scores; None, with a warning, if the evaluation fails: the training continues."""
        folder = self.folder / f"step{trainer.global_step:07d}"
        if trainer.is_global_zero:  # of a run before, of other weights
            shutil.rmtree(folder, ignore_errors=True)
        trainer.strategy.barrier()
        process = DistInfo(trainer.global_rank, trainer.world_size)
        with stage.ema.applied(stage), restored_modes(stage), self._at(stage.device):
            subject = EvalTarget(
                facts={"run": trainer.default_root_dir, "step": trainer.global_step},
                pipeline=pipeline_from_stage(stage),
                stages=stages_with_loss(stage.eval()),
                data=trainer.datamodule,  # type: ignore[attr-defined]
                feature_cache=self._kept,
            )
            try:
                return evaluate(self.plan, subject, folder, process)
            except (ValueError, OSError) as error:
                warnings.warn(f"no evaluation at step {trainer.global_step}: {error}", stacklevel=2)
                return None

    @contextmanager
    def _at(self, device: torch.device) -> Iterator[None]:
        """Have the networks that judge on a device within the block, and off it between two."""
        plan = self.plan
        judges = (plan.fid_features, plan.clip, plan.pickscore)
        networks = [each for each in judges if isinstance(each, nn.Module)]
        try:
            for network in networks:
                network.eval().to(device)
            yield
        finally:
            for network in networks:
                network.to("cpu")


@contextmanager
def restored_modes(module: nn.Module) -> Iterator[None]:
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
