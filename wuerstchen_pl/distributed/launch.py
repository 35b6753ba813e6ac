"""Which process this is, and which device it works on."""

import os
from typing import NamedTuple

import torch
import torch.distributed as dist


class DistInfo(NamedTuple):
    """The place of a process among those that share the work."""

    rank: int = 0
    """In [0, world_size)."""
    world_size: int = 1

    @staticmethod
    def from_env() -> "DistInfo":
        """As torchrun and Slurm's launcher state it in RANK and WORLD_SIZE."""
        return DistInfo(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    @staticmethod
    def from_process_group() -> "DistInfo":
        """As the initialized process group states it; (0, 1) without one."""
        if dist.is_available() and dist.is_initialized():
            return DistInfo(dist.get_rank(), dist.get_world_size())
        return DistInfo()


def resolve_device(requested: str | None = None) -> torch.device:
    """The requested device, or this process's own GPU, or the CPU where there is none."""
    if requested is not None:
        return torch.device(requested)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")
