"""The blocks that networks are stacks of: units of sharding, checkpointing and compilation."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from wuerstchen_pl.models.layers import Block
from wuerstchen_pl.models.vqgan import ScaledResBlock

BLOCKS = (Block, ScaledResBlock)


def find_blocks(module: nn.Module) -> list[nn.Module]:
    """All blocks in a module, in its order."""
    return [part for part in module.modules() if isinstance(part, BLOCKS)]


def checkpoint_activations(module: nn.Module) -> None:
    """Let each block keep its inputs alone, and compute the rest again for its backward pass.

    The gradients are the same, dropout included (Chen et al. 2016, arXiv 1604.06174).
    """
    for block in find_blocks(module):
        block.forward = _checkpointed(block.forward)


def _checkpointed(forward: Callable) -> Callable:
    def checkpointed(*args: Any) -> Any:  # and no functools.partial, which torch.compile skips
        return checkpoint(forward, *args, use_reentrant=False)

    return checkpointed


def compile_blocks(module: nn.Module) -> None:
    """Compile each block in place, which leaves the names of its weights as they are."""
    for block in find_blocks(module):
        block.compile()
