"""Conditioning of a denoiser's blocks: their inputs besides the latents, raw and cached.

``Block.cache_conditioning`` computes from a block's inputs everything that does not depend on the
latents. In training, this happens in the forward pass of each block; in sampling, once for all
steps.

Dimensions: B batch, T upcoming steps, C channels of a block, L tokens, D width of the text, E
channels of the semantic latents.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

Residuals = Mapping[int, Tensor]
"""Number of a block -> what a ControlNet adds to its input, (B, C, H, W), or one row for all."""


class BlockInputs(NamedTuple):
    """Inputs of a block besides the latents."""

    time: Tensor  # (B, time_dim), or (T, time_dim) for T upcoming steps
    cond: Tensor | None = None  # (B, L, D) text
    semantic: Tensor | None = None  # (B, E, H, W) at the latents' resolution
    residual: Tensor | None = None  # (B or 1, C, H, W): added to the input of the block

    def at_step(self, step: int) -> "BlockInputs":
        """Inputs for one of T upcoming steps, with time (1, time_dim)."""
        return self._replace(time=self.time[step : step + 1])

    def first_rows(self, count: int) -> "BlockInputs":
        """Inputs of the first ``count`` samples; all share one time."""
        return BlockInputs(self.time, *(x if x is None else x[:count] for x in self[1:]))


class CachedConditioning(NamedTuple):
    """What a block computes from its inputs independently of the latents."""

    modulation: Tensor  # (B, 2C): scale and shift; or (T, 2C) for T upcoming steps
    keys: Tensor | None  # (B, heads, L, C / heads)
    values: Tensor | None  # likewise
    semantic_proj: Tensor | None  # (B, H, W, 4C): added to the output of the first linear layer
    residual: Tensor | None  # (B or 1, C, H, W): added to the input of the block

    def at_step(self, step: int) -> "CachedConditioning":
        """Conditioning for one of T upcoming steps, with modulation (1, 2C)."""
        return self._replace(modulation=self.modulation[step : step + 1])

    def first_rows(self, count: int) -> "CachedConditioning":
        """Conditioning of the first ``count`` samples; all share one time."""
        return CachedConditioning(
            self.modulation, *(x if x is None else x[:count] for x in self[1:])
        )


def tile_batch(x: Tensor, like: Tensor | None) -> Tensor:
    """Repeat the whole batch until it has as many rows as ``like``: (B, ...) -> (k B, ...).

    Guided sampling needs two predictions for the same latents; up to the first block whose
    conditions differ, they are computed once.
    """
    if like is None or len(like) == len(x):
        return x
    return torch.cat([x] * (len(like) // len(x)))  # keeps channels-last, unlike repeat


def cache_conditioning(
    blocks: Iterable[nn.Module], inputs: Sequence[BlockInputs]
) -> list[CachedConditioning]:
    """Cached conditioning of each block for its inputs."""
    return [
        block.cache_conditioning(block_inputs)  # type: ignore[operator]
        for block, block_inputs in zip(blocks, inputs, strict=True)
    ]
