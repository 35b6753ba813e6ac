"""Waiting for a process that works alone."""

from datetime import timedelta
from typing import Any

import torch.distributed as dist

LONGEST_WAIT = timedelta(days=2)


def patient_barrier() -> None:
    """Wait for all processes, however long one of them works alone; every process must call it.

    The default group ends the run after its timeout, half an hour unless it is configured, and on
    GPUs it waits on the GPU; so this uses a temporary gloo group. Without a process group, it
    returns at once.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    group: Any = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
    try:
        dist.barrier(group=group)
    finally:
        dist.destroy_process_group(group)
