"""Training steps of Stage C: what compilation, checkpointing and the batch size are worth."""

from collections.abc import Iterator

from scripts.gpu_check.rows import Row, at_least
from scripts.gpu_check.sizes import Check
from scripts.gpu_check.training import Mode, measure_or_fail, measurement_rows

MFU = 0.5
"""Goal: arithmetic for the published sizes gives 114 samples/s on an H200."""


def rows(check: Check) -> Iterator[Row]:
    """The cost of each mode; the best MFU."""
    small, large = check.size.stage_c_batches
    modes = [Mode(small), Mode(large), Mode(large, checkpointed=True)]
    modes += [Mode(small, compiled=True), Mode(large, compiled=True)]
    modes += [Mode(large, compiled=True, checkpointed=True)]
    best: float | None = None
    for mode in modes:
        cost = measure_or_fail("c", mode, check.size)
        if isinstance(cost, Row):
            yield cost
            continue
        yield from measurement_rows("c", mode, check.size, cost)
        if cost.mfu is not None:
            best = max(best or 0.0, cost.mfu)
    if best is not None:
        yield at_least("Stage C, best MFU", best, MFU, "{:.1%}", judged=check.size.full)
