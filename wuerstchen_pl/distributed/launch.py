"""The rank and device of this process."""

import os
from typing import NamedTuple

import torch
import torch.distributed as dist


class DistInfo(NamedTuple):
    """Rank of a process, and number of processes."""

    rank: int = 0
    """In [0, world_size)."""
    world_size: int = 1

    @staticmethod
    def from_env() -> "DistInfo":
        """From the variables that torchrun (RANK, WORLD_SIZE) or Slurm's srun sets."""
        for rank, world_size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
            if rank in os.environ and world_size in os.environ:
                return DistInfo(int(os.environ[rank]), int(os.environ[world_size]))
        return DistInfo()

    @staticmethod
    def from_process_group() -> "DistInfo":
        """From the default process group; (0, 1) if there is none."""
        if dist.is_available() and dist.is_initialized():
            return DistInfo(dist.get_rank(), dist.get_world_size())
        return DistInfo()


def resolve_device(requested: str | None = None) -> torch.device:
    """The requested device; None selects the GPU of this process, or the CPU without GPUs."""
    if requested is not None:
        return torch.device(requested)
    if torch.cuda.is_available():
        return torch.device(
            "cuda", int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
        )
    return torch.device("cpu")
