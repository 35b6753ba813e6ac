"""Waiting for a process that works alone."""

from datetime import timedelta
from typing import Any

import torch.distributed as dist

LONGEST_WAIT = timedelta(days=2)


def patient_barrier() -> None:
    """Wait for all processes, however long one of them works alone; every process must call it.

    The default group of a GPU run gives up after 10 minutes (NCCL) and keeps the GPUs busy while it
    waits, so this uses a temporary gloo group. Without a process group, returns at once.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    group: Any = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
    try:
        dist.barrier(group=group)
    finally:
        dist.destroy_process_group(group)
