"""Random numbers of a training batch: functions of (seed, step, row), and of nothing else.

So a run resumes exactly from any checkpoint, with no generator's state to keep, and two processes
with half a batch each draw what one draws with the whole. Those of validation are functions of the
image's key: its losses are the same in every run, batch and process.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wuerstchen_pl.diffusion.sampler import generators_from_seeds, randn


class BatchRNG:
    """The numbers of one batch of one process; each call gives the next ones.

    They are drawn on the CPU, which makes them the same on every device.

    Args:
        seed: of the run.
        step: of the run, with the number of the batch within it if several make a step.
        rows: samples of the batch.
        first_row: place of the first one among those of all processes.
    """

    def __init__(self, *, seed: int, step: tuple[int, int], rows: int, first_row: int = 0) -> None:
        numbers = range(first_row, first_row + rows)
        self._rows = generators_from_seeds(
            [derive_seed(seed, *step, "row", row) for row in numbers]
        )
        self._batch = generators_from_seeds([derive_seed(seed, *step, "batch")])[0]

    def uniform(self, *shape: int) -> Tensor:
        """(rows, *shape) in [0, 1), on the CPU."""
        return torch.stack([torch.rand(shape, generator=row) for row in self._rows])

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal, in the shape and on the device of ``like`` (rows, ...), float32."""
        return randn(like.shape, self._rows, like.device)

    def batch_uniform(self) -> float:
        """A number in [0, 1) for the whole batch, the same in every process."""
        return float(torch.rand((), generator=self._batch))

    def randint(self, size: int, number: int) -> Tensor:
        """(number,) indices below ``size``, the same in every process."""
        return torch.randint(size, (number,), generator=self._batch)


NUM_VALIDATION_TIMESTEPS = 4
"""Times at which each image is validated, one in each quarter of (0, 1)."""


def validation_losses(
    loss: Callable[[Tensor, Tensor], Tensor], keys: Sequence[str], x0: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses of images at times and with noise that their keys choose.

    Args:
        loss: (B,) times and noise as ``x0`` -> (B,) losses.
        keys: B names.
        x0: (B, ...) latents.

    Returns:
        times and losses, (B, VALIDATION_TIMES).
    """
    rows = generators_from_seeds([derive_seed("validation", key) for key in keys])
    places = torch.stack([torch.rand(NUM_VALIDATION_TIMESTEPS, generator=row) for row in rows])
    times = ((torch.arange(NUM_VALIDATION_TIMESTEPS) + places) / NUM_VALIDATION_TIMESTEPS).to(
        x0.device
    )
    losses = [loss(t, randn(x0.shape, rows, x0.device)) for t in times.unbind(1)]
    return times, torch.stack(losses, dim=1)


def derive_seed(*parts: int | str) -> int:
    """A seed of 63 bits from numbers and names."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
