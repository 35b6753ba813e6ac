"""Restores what inference changes in a network that is being trained."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def restored_modes(module: nn.Module) -> Iterator[None]:
    """Restore ``training`` and ``requires_grad`` of submodules and parameters after the block."""
    modes = [(part, part.training) for part in module.modules()]
    grad_flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        yield
    finally:
        for part, mode in modes:
            part.train(mode)  # and its parts, whose own modes follow
        for parameter, requires_grad in grad_flags:
            parameter.requires_grad_(requires_grad)
