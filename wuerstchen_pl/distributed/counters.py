"""Counters summed over processes."""

from collections import Counter

import torch.distributed as dist
from torch import Tensor

from wuerstchen_pl.distributed.launch import DistInfo


def sum_counters(counter: Counter[str]) -> Counter[str]:
    """The sum over processes, whose keys may differ; every process must call it.

    Without a process group, returns a copy.
    """
    counters: list[Counter[str] | None] = [None] * DistInfo.from_process_group().world_size
    if len(counters) == 1:
        return Counter(counter)
    dist.all_gather_object(counters, counter)
    total: Counter[str] = Counter()
    for process_counter in counters:
        total.update(process_counter)
    return total


def sum_counts(counts: Tensor) -> Tensor:
    """The sum over processes, in place; every process must call it.

    Lightning's ``strategy.reduce`` would wait for all processes and for the GPU first.
    """
    if DistInfo.from_process_group().world_size > 1:
        dist.all_reduce(counts)
    return counts
