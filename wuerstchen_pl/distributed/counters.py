"""Counters of all processes together."""

from collections import Counter

import torch.distributed as dist

from wuerstchen_pl.distributed.launch import DistInfo


def sum_counters(counter: Counter[str]) -> Counter[str]:
    """The sum over processes; every process has to call it, with names of its own.

    Without a process group it is a copy.
    """
    every: list[Counter[str] | None] = [None] * DistInfo.from_process_group().world_size
    if len(every) == 1:
        return Counter(counter)
    dist.all_gather_object(every, counter)
    total: Counter[str] = Counter()
    for each in every:
        total.update(each)
    return total
