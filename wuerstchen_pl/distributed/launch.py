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
        """From the variables that torchrun or srun sets; (0, 1) if neither launched the process."""
        # not SLURM_NTASKS, which a batch script has too, where it runs a command without srun
        for rank, world_size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
            if rank in os.environ and world_size in os.environ:
                return DistInfo(int(os.environ[rank]), int(os.environ[world_size]))
        return DistInfo()

    @staticmethod
    def from_process_group() -> "DistInfo":
        """From the default process group; (0, 1) if there is none."""
        if dist.is_available() and dist.is_initialized():
            return DistInfo(dist.get_rank(), dist.get_world_size())
        return DistInfo()


def use_tf32(device: torch.device) -> None:
    """On a GPU, compute float32 matrix products in TF32, as convolutions are by default."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def resolve_device(requested: str | None = None) -> torch.device:
    """The requested device; None selects the GPU of this process, or the CPU without GPUs."""
    if requested is not None:
        return torch.device(requested)
    if torch.cuda.is_available():
        local_rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
        return torch.device("cuda", int(local_rank))
    return torch.device("cpu")
