"""What a denoiser's blocks read besides the latents, and what they need of it.

What does not depend on the latents is digested apart: ``Block.conditioning`` makes of a block's
inputs what its forward pass needs of them. Training leaves that to the forward pass, block by
block; sampling does it once for all steps.

Letters: B batch, T steps to come, C channels of a block, L tokens, D width of the text, E channels
of the semantic latents.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class BlockInputs(NamedTuple):
    """What a block reads besides the latents."""

    time: Tensor  # (B, time_dim), or (T, time_dim) for T steps to come
    cond: Tensor | None = None  # (B, L, D) text
    semantic: Tensor | None = None  # (B, E, H, W) at the latents' resolution

    def at_step(self, step: int) -> "BlockInputs":
        """The inputs for one of T steps to come: time (1, time_dim)."""
        return self._replace(time=self.time[step : step + 1])

    def first_rows(self, count: int) -> "BlockInputs":
        """The inputs of the first ``count`` samples, at one time."""
        return BlockInputs(self.time, *(x if x is None else x[:count] for x in self[1:]))


class CachedConditioning(NamedTuple):
    """What a block needs of its inputs, whatever the latents are."""

    modulation: Tensor  # (B, 2C): scale and shift; or (T, 2C) for T steps to come
    keys: Tensor | None  # (B, heads, L, C / heads)
    values: Tensor | None  # likewise
    semantic_proj: (
        Tensor | None
    )  # (B, H, W, 4C): what the semantic latents add to the first linear layer

    def at_step(self, step: int) -> "CachedConditioning":
        """The conditioning for one of T steps to come: modulation (1, 2C)."""
        return self._replace(modulation=self.modulation[step : step + 1])

    def first_rows(self, count: int) -> "CachedConditioning":
        """The conditioning of the first ``count`` samples, at one time."""
        return CachedConditioning(
            self.modulation, *(x if x is None else x[:count] for x in self[1:])
        )


def tile_batch(x: Tensor, like: Tensor | None) -> Tensor:
    """(B, ...) -> (k B, ...), as many rows as ``like`` has, the whole again and again.

    Guided sampling asks for two predictions of the same latents: until a condition is met that
    differs between the two, they are one.
    """
    if like is None or len(like) == len(x):
        return x
    return torch.cat([x] * (len(like) // len(x)))  # which keeps channels last, as repeat does not


def cache_conditioning(
    blocks: Iterable[nn.Module], inputs: Sequence[BlockInputs]
) -> list[CachedConditioning]:
    """What each of the blocks needs of its inputs."""
    return [block.cache_conditioning(given) for block, given in zip(blocks, inputs, strict=True)]  # type: ignore[operator]
