"""Counts and other small values of all processes."""

import functools
from collections import Counter
from typing import TypeVar, cast

import torch.distributed as dist
from torch import Tensor

from wuerstchen_pl.distributed.launch import DistInfo

T = TypeVar("T")


def gather(value: T) -> list[T]:
    """The values of all processes, by rank; every process must call it.

    The default group would wait for the GPU, so with NCCL this uses a gloo group.
    """
    world_size = DistInfo.from_process_group().world_size
    if world_size == 1:
        return [value]
    values: list[T | None] = [None] * world_size
    dist.all_gather_object(values, value, group=_cpu_group(dist.group.WORLD))
    return cast(list[T], values)


def sum_counters(counter: Counter[str]) -> Counter[str]:
    """The sum over processes, whose keys may differ; every process must call it."""
    total: Counter[str] = Counter()
    for process_counter in gather(counter):
        total.update(process_counter)
    return total


def sum_counts(counts: Tensor) -> Tensor:
    """The sum over processes, in place; every process must call it.

    Lightning's ``strategy.reduce`` would wait for all processes and for the GPU first.
    """
    if DistInfo.from_process_group().world_size > 1:
        dist.all_reduce(counts)
    return counts


@functools.lru_cache(maxsize=1)
def _cpu_group(default: dist.ProcessGroup) -> dist.ProcessGroup:
    """The default group if it is a gloo group, or else a gloo group of the same processes."""
    if dist.get_backend(default) == dist.Backend.GLOO:
        return default
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
