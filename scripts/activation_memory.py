"""Count what a training step keeps for the backward pass, on a GPU that need not exist.

The networks run on tensors without data on a pretended GPU, in bfloat16 autocast, with the outputs
that flash attention saves.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from wuerstchen_pl.models.activations import SavedActivations, checkpoint_activations
from wuerstchen_pl.models.fake_cuda import DEVICE, FakeCUDA, FlashAttention, fake_cuda

Build = Callable[[], tuple[list[nn.Module], Callable[[int], Any]]]
"""Makes the networks of a step, and its forward pass as a function of the batch size."""


class SavedBytes(NamedTuple):
    """Bytes of activations per sample, without and with activation checkpointing."""

    plain: float
    checkpointed: float


def saved_bytes(build: Build) -> SavedBytes:
    """Count the activations of a step; ``build`` is called on the meta device."""
    return SavedBytes(_per_sample(build, checkpoint=False), _per_sample(build, checkpoint=True))


def _per_sample(build: Build, *, checkpoint: bool) -> float:
    with torch.device("meta"):
        networks, forward = build()
    with fake_cuda(FakeCUDA()), FlashAttention(), DEVICE, torch.autocast("cuda", torch.bfloat16):
        for network in networks:
            network.to_empty(device=DEVICE)
            if checkpoint:
                checkpoint_activations(network)
        weights = [p for network in networks for p in network.parameters()]
        # what does not grow with the batch, such as weights in bfloat16, cancels out
        return (_saved(forward, 4, weights) - _saved(forward, 2, weights)) / 2


def _saved(forward: Callable[[int], Any], batch_size: int, weights: list[nn.Parameter]) -> int:
    saved = SavedActivations()
    with saved.collect():
        output = forward(batch_size)
    del output
    return saved.nbytes(weights)
