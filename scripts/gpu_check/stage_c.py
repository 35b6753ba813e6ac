"""Training steps of Stage C: what compilation, checkpointing and the batch size are worth."""

from collections.abc import Iterator

from scripts.gpu_check.environment import product_rate
from scripts.gpu_check.rows import Row, at_least
from scripts.gpu_check.sizes import Check
from scripts.gpu_check.training import Mode, measure_or_fail, measurement_rows

SHARE = 0.5
"""Goal for the best mode, of the rate of a matrix product on the same device."""


def rows(check: Check) -> Iterator[Row]:
    """The cost of each mode, and the best rate."""
    small, large = check.size.stage_c_batches
    modes = [Mode(small), Mode(large), Mode(large, checkpointed=True)]
    modes += [Mode(small, compiled=True), Mode(large, compiled=True)]
    modes += [Mode(large, compiled=True, checkpointed=True)]
    best = 0.0
    for mode in modes:
        cost = measure_or_fail("c", mode, check.size)
        if isinstance(cost, Row):
            yield cost
            continue
        yield from measurement_rows("c", mode, check.size, cost)
        best = max(best, cost.flops)
    share = best / product_rate(check)
    name = "Stage C, best rate relative to a bfloat16 matrix product"
    yield at_least(name, share, SHARE, "{:.1%}", judged=check.size.full)
