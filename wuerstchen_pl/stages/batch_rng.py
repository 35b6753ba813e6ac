"""Random numbers of a training batch, as functions of (seed, step, row) only.

A run therefore resumes exactly from any checkpoint without saved generator states, and two
processes with half a batch each use the same numbers as one process with the whole batch.
Validation numbers are functions of the sample's key, so that its losses are the same in every run,
batch and process.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wuerstchen_pl.diffusion.sampler import generators_from_seeds, randn
from wuerstchen_pl.transfer import to_device


class BatchRNG:
    """Random numbers of one batch on one process; each call returns the next ones.

    They are generated on the CPU, so that they are the same on every device.

    Args:
        seed: the run's seed.
        step: (optimizer step, index of the micro-batch within it).
        rows: number of samples in the batch.
        first_row: index of the first sample in the batch of all processes together.
    """

    def __init__(self, *, seed: int, step: tuple[int, int], rows: int, first_row: int = 0) -> None:
        row_indices = range(first_row, first_row + rows)
        self._row_generators = generators_from_seeds(
            [derive_seed(seed, *step, "row", row) for row in row_indices]
        )
        self._batch_generator = generators_from_seeds([derive_seed(seed, *step, "batch")])[0]

    def uniform(self, *shape: int) -> Tensor:
        """(rows, *shape) in [0, 1), on the CPU."""
        return torch.stack([torch.rand(shape, generator=row) for row in self._row_generators])

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal float32, with the shape (rows, ...) and device of ``like``."""
        return randn(like.shape, self._row_generators, like.device)

    def batch_uniform(self) -> float:
        """A number in [0, 1) for the whole batch, the same on every process."""
        return float(torch.rand((), generator=self._batch_generator))

    def randint(self, high: int, size: int) -> Tensor:
        """(size,) integers in [0, high), the same on every process."""
        return torch.randint(high, (size,), generator=self._batch_generator)


NUM_VALIDATION_TIMESTEPS = 4
"""Number of times at which each sample is validated, one in each quarter of (0, 1)."""


def validation_losses(
    loss: Callable[[Tensor, Tensor], Tensor], keys: Sequence[str], x0: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses of samples at times and with noise derived from their keys.

    Args:
        loss: (B,) times and noise in the shape of ``x0`` -> (B,) losses.
        keys: B sample names.
        x0: (B, ...) latents.

    Returns:
        Times and losses, each (B, NUM_VALIDATION_TIMESTEPS).
    """
    generators = generators_from_seeds([derive_seed("validation", key) for key in keys])
    offsets = torch.stack([torch.rand(NUM_VALIDATION_TIMESTEPS, generator=g) for g in generators])
    times = (torch.arange(NUM_VALIDATION_TIMESTEPS) + offsets) / NUM_VALIDATION_TIMESTEPS
    times = to_device(times, x0.device)
    losses = [loss(t, randn(x0.shape, generators, x0.device)) for t in times.unbind(1)]
    return times, torch.stack(losses, dim=1)


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed, the hash of numbers and strings."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
