"""A network's blocks: the units of sharding, activation checkpointing and compilation."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from wuerstchen_pl.models.layers import Block
from wuerstchen_pl.models.vqgan import ScaledResBlock

BLOCKS = (Block, ScaledResBlock)


def find_blocks(module: nn.Module) -> list[nn.Module]:
    """All blocks of a module, in module order."""
    return [part for part in module.modules() if isinstance(part, BLOCKS)]


def checkpoint_activations(module: nn.Module) -> None:
    """Make each block store only its inputs and recompute its activations in the backward pass.

    The gradients do not change, dropout included (Chen et al. 2016, arXiv 1604.06174).
    """
    for block in find_blocks(module):
        block.forward = _checkpointed(block.forward)


def _checkpointed(forward: Callable) -> Callable:
    def checkpointed(*args: Any) -> Any:  # not functools.partial, which torch.compile skips
        return checkpoint(forward, *args, use_reentrant=False)

    return checkpointed


def compile_blocks(module: nn.Module) -> None:
    """Compile each block in place, which keeps the names of its weights."""
    for block in find_blocks(module):
        block.compile()
