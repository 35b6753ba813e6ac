"""A network's blocks: the units of sharding, activation checkpointing and compilation."""

import torch
import torch._dynamo
from torch import nn

from wuerstchen_pl.models.layers import Block
from wuerstchen_pl.models.paella import PaellaBlock
from wuerstchen_pl.models.vqgan import ScaledResBlock

BLOCKS = (Block, PaellaBlock, ScaledResBlock)


def find_blocks(module: nn.Module) -> list[nn.Module]:
    """All blocks of a module, in module order."""
    return [part for part in module.modules() if isinstance(part, BLOCKS)]


def compile_blocks(module: nn.Module) -> None:
    """Compile each block in place, which keeps the names of its weights.

    Changes two settings of Dynamo for the whole process.
    """
    # a block's code is shared by blocks of all widths, batch sizes and modes: Stage B needs 7
    # graphs a batch size, and beyond the limit Dynamo silently runs the rest eagerly
    torch._dynamo.config.recompile_limit = 64
    # DDP would split blocks above its bucket size, and fail at the first batch of another size
    torch._dynamo.config.optimize_ddp = False
    for block in find_blocks(module):
        block.compile()
