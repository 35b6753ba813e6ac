"""Schedule-free optimizers (arXiv 2405.15682), which keep an average of the weights they train.

They compute gradients at weights y, and keep an average x to evaluate. A checkpoint has y as the
raw weights, so that a resumed run is bit-equal, and x as the EMA weights, which everything else
reads.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def is_schedule_free(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer has the methods of the package ``schedulefree``."""
    return hasattr(optimizer, "train") and hasattr(optimizer, "eval")


def prepare(optimizer: torch.optim.Optimizer) -> None:
    """Let a schedule-free optimizer train; does nothing to any other, nor to a resumed one."""
    if is_schedule_free(optimizer):
        optimizer.train()  # type: ignore[attr-defined]


@contextmanager
@torch.no_grad()
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The weights are x within the block, and bit-equal to what they were after it.

    Does nothing for any other optimizer.
    """
    if not is_schedule_free(optimizer):
        yield
        return
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.clone() for p in weights]
    optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]  # which has rounding errors
        for p, value in zip(weights, before, strict=True):
            p.copy_(value)
