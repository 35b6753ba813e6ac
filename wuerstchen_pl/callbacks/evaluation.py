"""Evaluation during training, with EMA weights and the code of the evaluation command."""

import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

from wuerstchen_pl.callbacks.checkpoints import Checkpoints
from wuerstchen_pl.callbacks.restored_modes import restored_modes
from wuerstchen_pl.distributed.launch import DistInfo
from wuerstchen_pl.distributed.waiting import patient_barrier
from wuerstchen_pl.evaluation.inputs import read_inputs
from wuerstchen_pl.evaluation.metrics.score import Score
from wuerstchen_pl.evaluation.plan import EvaluationPlan
from wuerstchen_pl.evaluation.run import EvalTarget, check_plan, evaluate, stages_with_loss
from wuerstchen_pl.pipelines.loading import pipeline_from_stage
from wuerstchen_pl.stages.c import StageC


class EvaluationCallback(L.Callback):
    """Periodically save and evaluate Stage C, and log ``eval/...``.

    The results equal those of ``python -m wuerstchen_pl.evaluate dtype=float32`` for the checkpoint
    of the same step, as both use the same code, unless the base of an adapter is in bfloat16 during
    training. Training is not affected.

    Args:
        folder: folder of the reports, one folder ``step0001000`` each.
        every_steps: steps between two evaluations.
        plan: what to evaluate.
    """

    needs_float32 = True
    """FSDP gathers weights in float32, also for training, as it cannot do both."""

    def __init__(self, *, folder: str, every_steps: int, plan: EvaluationPlan) -> None:
        if every_steps < 1:
            raise ValueError(f"every_steps={every_steps} is out of range; use 1 or more")
        self.folder, self.every_steps, self.plan = Path(folder), every_steps, plan
        self.seconds = 0.0  # time spent in evaluation
        self._last_step = 0
        self._kept: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that the plan can be evaluated in this run.

        Raises:
            ValueError: if the stage is not Stage C, training images are needed but the data are
                cached, or the plan is invalid.
        """
        self._last_step = trainer.global_step
        if not isinstance(pl_module, StageC):
            raise ValueError(
                "callbacks=with_evaluation generates images, which needs Stage C; use "
                "callbacks=default for other stages"
            )
        _ = pl_module.drawing_stage_b  # which raises if it is missing
        data = trainer.datamodule  # type: ignore[attr-defined]
        if hasattr(data, "made_with") and self.plan.needs_data:
            raise ValueError(
                "callbacks=with_evaluation compares with training images, but data=cached has "
                "none; set callbacks.evaluation.plan.reference to a folder and "
                "callbacks.evaluation.plan.prompts to a file"
            )
        check_plan(self.plan, read_inputs(self.plan, data))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Evaluate every ``every_steps`` steps."""
        step = trainer.global_step
        if step % self.every_steps or step == self._last_step:
            return
        self._last_step = step
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoints):
                callback.save(trainer)  # evaluation may take long, and signals wait for its end
        start = time.perf_counter()
        scores = self._evaluate(trainer, cast(StageC, pl_module))
        patient_barrier()  # rank 0 scores alone
        self.seconds += time.perf_counter() - start
        if scores is not None:
            metrics = {f"eval/{name}": score.value for name, score in scores.items()}
            for logger in trainer.loggers:  # directly: Lightning's log waits for a logging step
                logger.log_metrics(metrics, step - 1)

    def _evaluate(self, trainer: L.Trainer, stage: StageC) -> dict[str, Score] | None:
        """The scores, or None on other processes; a failure only warns, and training continues."""
        folder = self.folder / f"step{trainer.global_step:07d}"
        if trainer.is_global_zero:  # may be left by an earlier run with other weights
            shutil.rmtree(folder, ignore_errors=True)
        trainer.strategy.barrier()
        process = DistInfo(trainer.global_rank, trainer.world_size)
        with (
            stage.ema.applied(stage),
            stage.frozen.all_on(stage.device),
            restored_modes(stage),
            self._networks_on(stage.device),
        ):
            target = EvalTarget(
                metadata={"run": trainer.default_root_dir, "step": trainer.global_step},
                pipeline=pipeline_from_stage(stage),
                stages=stages_with_loss(stage.eval()),
                feature_cache=self._kept,
            )
            try:
                inputs = read_inputs(self.plan, trainer.datamodule)  # type: ignore[attr-defined]
                return evaluate(self.plan, inputs, target, folder, process)
            except (ValueError, OSError) as error:
                warnings.warn(f"no evaluation at step {trainer.global_step}: {error}", stacklevel=2)
                return None

    @contextmanager
    def _networks_on(self, device: torch.device) -> Iterator[None]:
        """Move the metrics' networks to a device within the block, and to the CPU after it."""
        plan = self.plan
        candidates = (plan.fid_features, plan.clip, plan.pickscore)
        networks = [network for network in candidates if isinstance(network, nn.Module)]
        try:
            for network in networks:
                network.eval().to(device)
            yield
        finally:
            for network in networks:
                network.to("cpu")
