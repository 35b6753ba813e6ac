"""Gradients of an optimizer's parameter groups: their norms, and clipping by norm."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from wuerstchen_pl.distributed.fsdp2 import local_shards


def group_gradients(
    groups: Sequence[dict[str, Any]], *, separate_losses: bool
) -> dict[str, list[Tensor]]:
    """Gradients that are clipped by one norm, by the name under which it is logged.

    Args:
        groups: the optimizer's parameter groups.
        separate_losses: whether each group has its own loss, and so its own norm. If all groups
            have the same loss, one norm over all of them keeps the direction of the gradient.
    """
    if not separate_losses:
        return {"grad_norm": [g for group in groups for g in _gradients(group)]}
    return {f"grad_norm_{group['name']}": _gradients(group) for group in groups}


def clip(gradients: Sequence[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale gradients, which may be sharded, in place so that their norm is at most ``max_norm``.

    Lightning's own clipping refuses fused optimizers.

    Args:
        gradients: may be empty.
        norm: of all gradients.
        max_norm: the largest norm.
    """
    if shards := local_shards(gradients):
        torch._foreach_mul_(shards, (max_norm / (norm + 1e-6)).clamp(max=1))


def _gradients(group: dict[str, Any]) -> list[Tensor]:
    return [cast(Tensor, p.grad) for p in group["params"] if p.grad is not None]
