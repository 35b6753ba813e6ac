"""Training steps of Stage C under FSDP on one process: the overhead of its machinery."""

from collections.abc import Iterator

import torch.distributed as dist

from scripts.gpu_check.rows import Row, at_most
from scripts.gpu_check.sizes import Check
from scripts.gpu_check.training import Mode, measure_or_fail, measurement_rows

OVERHEAD = 1.05
"""Time of a step relative to one process without FSDP."""


def rows(check: Check) -> Iterator[Row]:
    """The cost of a step with and without FSDP, eager and compiled."""
    batch, _ = check.size.stage_c_batches
    try:
        for compiled in (False, True):
            yield from compare(Mode(batch, compiled=compiled), check)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def compare(mode: Mode, check: Check) -> Iterator[Row]:
    """A mode with and without FSDP."""
    sharded = mode._replace(sharded=True)
    plain_cost = measure_or_fail("c", mode, check.size)
    cost = measure_or_fail("c", sharded, check.size)
    if isinstance(cost, Row) or isinstance(plain_cost, Row):
        yield from (row for row in (plain_cost, cost) if isinstance(row, Row))
        return
    yield from measurement_rows("c", sharded, check.size, cost)
    name = f"Stage C, {sharded}: time relative to one process without FSDP"
    ratio = cost.seconds / plain_cost.seconds
    yield at_most(name, ratio, OVERHEAD, "{:.3f}", judged=check.size.full)
