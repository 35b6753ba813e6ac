"""Stage C as a student of a trained one: few steps, and no guidance."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from wuerstchen_pl.batch import Batch
from wuerstchen_pl.diffusion.distillation import (
    MAX_TEACHER_STEPS,
    jump_loss,
    jump_target,
    jump_times,
)
from wuerstchen_pl.diffusion.guidance import Guidance
from wuerstchen_pl.diffusion.objective import noise_error
from wuerstchen_pl.models.prior import Prior
from wuerstchen_pl.sampling.control import Control
from wuerstchen_pl.sampling.prior import PriorSampler
from wuerstchen_pl.sampling.student import check_student_steps
from wuerstchen_pl.stages.c import StageC
from wuerstchen_pl.stages.frozen import is_on

REFUSED = ("adapter", "text_adapter", "words", "preservation", "train_text_encoder")
"""Arguments that train something else."""


class DistillationStage(StageC):
    """Trains a student, which starts as a copy of its teacher; see ``diffusion.distillation``.

    The student is sampled in 1 to 8 equal steps without guidance: that of the teacher is built in.

    Args:
        student_steps: segments of the student, 1 to 8: the steps that it is trained for.
        teacher: a trained prior, frozen; None for a student that is only sampled.
        teacher_steps: of the teacher in each step of the student.
        guidance_scale: of the teacher, away from the empty caption; up to 1: off.
        arguments: of ``StageC``; none that trains something else.

    Raises:
        ValueError: if an argument does not fit.
    """

    TRAINING_ONLY = (*StageC.TRAINING_ONLY, "teacher", "teacher_steps", "guidance_scale")

    def __init__(
        self,
        *,
        student_steps: int,
        teacher: Prior | None = None,
        teacher_steps: int = 16,
        guidance_scale: float = 4.0,
        **arguments: Any,
    ) -> None:
        for key in REFUSED:
            if arguments.get(key):
                raise ValueError(f"distillation trains the prior alone; remove stage.{key}")
        if (p2 := arguments.setdefault("p2", "none")) != "none":
            raise ValueError(f"p2={p2} is not a weight of distillation; set stage.p2=none")
        check_student_steps(student_steps)
        if not 1 <= teacher_steps <= MAX_TEACHER_STEPS // student_steps:
            raise ValueError(
                f"teacher_steps={teacher_steps} is out of range; with student_steps="
                f"{student_steps}, use 1 to {MAX_TEACHER_STEPS // student_steps}"
            )
        super().__init__(**arguments)
        self.frozen.register("teacher", teacher)
        self.student_steps, self.teacher_steps = student_steps, teacher_steps
        self.guidance = Guidance(scale=guidance_scale)
        self.grid_sampling = {"num_steps": student_steps, "guidance_scale": 0.0}
        self._empty_text: Tensor | None = None

    def prior_sampler(self) -> PriorSampler:
        """The sampler that uses this stage's weights."""
        sampler = super().prior_sampler()
        sampler.student_steps = self.student_steps
        return sampler

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """See ``TextConditionalStage``."""
        self._read_empty_text(batch)
        return super().training_step(batch, batch_idx)

    def validation_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See ``TextConditionalStage``."""
        self._read_empty_text(batch)
        return super().validation_losses(batch)

    def _read_empty_text(self, batch: Batch) -> None:
        """Use a cached embedding, so that the text encoder is not needed."""
        if "empty_text" in batch:
            self._empty_text = batch["empty_text"][:1]

    def loss(
        self, x0: Tensor, t: Tensor, noise: Tensor, text: Tensor,
        mask: Tensor | None = None, control: Control | None = None,
    ) -> Tensor:  # fmt: skip
        """``jump_loss`` of the jumps from ``t``, (B,)."""
        times = jump_times(t, student_steps=self.student_steps, teacher_steps=self.teacher_steps)
        xt = self.schedule.add_noise(x0, times.t, noise)
        with torch.no_grad():
            target = jump_target(
                self.schedule, xt, times,
                teacher=partial(self._teach, text), student=lambda x, s: self.prior(x, s, text),
            )  # fmt: skip
        errors = noise_error(self.prior(xt, times.t, text), target, mask)
        return jump_loss(self.schedule, times.t, errors)

    def _teach(self, text: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """The guided prediction of the teacher, in the precision of the student."""
        teacher = self.frozen["teacher"]
        if teacher is None:
            raise ValueError("a student is trained by its teacher; set teacher")
        if not is_on(self.device, teacher):
            teacher.to(self.device)
        if not self.guidance.on:
            return teacher(xt, t, text)
        if self._empty_text is None:
            self._empty_text = self.text([""])
        empty = self._empty_text.to(text).expand_as(text)
        both = teacher(torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([text, empty]))
        return self.guidance.combine(*both.chunk(2))
