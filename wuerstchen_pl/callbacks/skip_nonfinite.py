"""Steps whose gradient is not finite are left out and counted; many in a row end the run."""

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from wuerstchen_pl.callbacks.checkpoints import Checkpoints


class SkipNonFiniteGrads(L.Callback):
    """Take the gradients away from a step in which one is NaN or infinite.

    The optimizer then changes nothing, no weight and no moment, and buffers, such as the statistics
    of batch norms, are what they were before. The step counts as one: schedules and data go on.

    Args:
        max_in_a_row: steps left out in a row, at which the run ends.
    """

    def __init__(self, *, max_in_a_row: int = 20) -> None:
        if max_in_a_row < 1:
            raise ValueError(f"max_in_a_row={max_in_a_row} never trains; use 1 or more")
        self.max_in_a_row = max_in_a_row
        self.skipped = 0
        self._in_a_row = 0
        self._step = -1
        self._buffers: list[Tensor] = []

    def state_dict(self) -> dict[str, int]:
        """The number of steps left out, for the checkpoint."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on counting."""
        self.skipped = state_dict["skipped"]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Keep the buffers as they are before a step."""
        if trainer.global_step == self._step:  # in the midst of an accumulated one
            return
        self._step = trainer.global_step
        now = _floating(pl_module)
        if len(self._buffers) != len(now) or any(
            a.device != b.device for a, b in zip(self._buffers, now, strict=True)
        ):
            self._buffers = [b.clone() for b in now]
        elif now:
            torch._foreach_copy_(self._buffers, now)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Look at the gradients; the same on all processes, as they have them in common.

        Raises:
            ValueError: if too many steps were left out in a row.
        """
        params = [p for p in pl_module.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if norm.isfinite():
            self._in_a_row = 0
            return
        for p in params:
            p.grad = None
        with torch.no_grad():
            for buffer, kept in zip(_floating(pl_module), self._buffers, strict=True):
                buffer.copy_(kept)
        self.skipped += 1
        self._in_a_row += 1
        pl_module.log("train/skipped_steps", float(self.skipped))
        if self._in_a_row >= self.max_in_a_row:
            raise ValueError(
                f"{self._in_a_row} steps in a row had no finite gradient, up to step "
                f"{trainer.global_step}; {_last_saved(trainer)}. Lower stage.optimizer.lr, set "
                "trainer.gradient_clip_val=1.0, or train with trainer.precision=32-true"
            )


def _floating(module: nn.Module) -> list[Tensor]:
    return [b.detach() for b in module.buffers() if b.is_floating_point()]


def _last_saved(trainer: L.Trainer) -> str:
    """What there is to go on from."""
    saved = [c.newest() for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoints)]
    if not saved or saved[0] is None:
        return "nothing was saved before"
    return f"{saved[0]} is the last checkpoint, and its weights are finite"
