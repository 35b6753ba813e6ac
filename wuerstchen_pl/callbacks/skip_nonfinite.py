"""Skip and count optimizer steps with non-finite gradients; too many in a row end the run."""

from typing import cast

import lightning as L
import torch
from torch import Tensor, nn

from wuerstchen_pl.callbacks.checkpoints import Checkpoints
from wuerstchen_pl.plural import plural
from wuerstchen_pl.stages.stage import Stage


class SkipNonFiniteGrads(L.Callback):
    """Discard the gradients of a step if any is NaN or infinite.

    The optimizer then changes neither weights nor its state, and buffers, such as batch-norm
    statistics, are restored to their values before the step. The step still counts for schedules
    and data.

    A fused optimizer skips the step on the device, without a synchronization. For any other, the
    host waits for the gradients of every step.

    Args:
        max_in_a_row: number of consecutive skipped steps that ends the run, at the next step that
            logs.

    Raises:
        ValueError: if ``max_in_a_row`` is below 1.
    """

    def __init__(self, *, max_in_a_row: int = 20) -> None:
        if max_in_a_row < 1:
            raise ValueError(f"max_in_a_row={max_in_a_row} is out of range; use 1 or more")
        self.max_in_a_row = max_in_a_row
        self._skipped = 0
        self._in_a_row = 0
        self._unread: dict[int, Tensor] = {}
        self._step = -1
        self._buffers: Tensor | None = None

    @property
    def skipped(self) -> int:
        """The number of skipped steps; waits for the device."""
        return self._skipped + sum(int(nonfinite) for nonfinite in self._unread.values())

    def state_dict(self) -> dict[str, int]:
        """The number of skipped steps."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore the number of skipped steps."""
        self._skipped = state_dict["skipped"]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Copy the buffers before the first micro-batch of a step."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self._buffers = _concatenated(_floating_buffers(pl_module))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Check the gradient norms, which are the same on all processes.

        They are computed once per step, and reused for clipping.

        Raises:
            ValueError: if too many steps were skipped in a row.
        """
        stage = cast(Stage, pl_module)
        norms = torch.stack(stage.gradient_norms(optimizer))
        nonfinite = norms.isfinite().all().logical_not()
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = nonfinite.float()  # type: ignore[attr-defined]  # as GradScaler
        elif nonfinite:
            stage.discard_gradients()
        self._restore_buffers(stage, nonfinite)
        self._unread[trainer.global_step] = nonfinite
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._count_skipped(trainer, stage)

    @torch.no_grad()
    def _restore_buffers(self, stage: Stage, nonfinite: Tensor) -> None:
        buffers = _floating_buffers(stage)
        current = _concatenated(buffers)
        if current is None or self._buffers is None:
            return
        kept = torch.where(nonfinite, self._buffers, current).split([b.numel() for b in buffers])
        torch._foreach_copy_(buffers, [v.view_as(b) for v, b in zip(kept, buffers, strict=True)])

    def _count_skipped(self, trainer: L.Trainer, stage: Stage) -> None:
        steps, flags = list(self._unread), torch.stack(list(self._unread.values())).tolist()
        self._unread = {}
        for step, nonfinite in zip(steps, flags, strict=True):
            self._in_a_row = self._in_a_row + 1 if nonfinite else 0
            self._skipped += nonfinite
            if self._in_a_row >= self.max_in_a_row:
                raise ValueError(
                    f"{plural(self._in_a_row, 'step')} in a row had non-finite gradients, up to "
                    f"step {step}; {_last_checkpoint(trainer)}. Lower stage.optimizer.lr, "
                    "set trainer.gradient_clip_val=1.0, or train with trainer.precision=32-true"
                )
        if any(flags):
            stage.log("train/skipped_steps", float(self._skipped))


def _concatenated(tensors: list[Tensor]) -> Tensor | None:
    return torch.cat([tensor.flatten() for tensor in tensors]) if tensors else None


def _floating_buffers(module: nn.Module) -> list[Tensor]:
    return [b.detach() for b in module.buffers() if b.is_floating_point()]


def _last_checkpoint(trainer: L.Trainer) -> str:
    """A clause that names the checkpoint to resume from."""
    saved = [c.newest() for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoints)]
    if not saved or saved[0] is None:
        return "no checkpoint was saved before that"
    return f"the last checkpoint is {saved[0]}, and its weights are finite"
