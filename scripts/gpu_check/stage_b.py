"""Training steps of Stage B with its compressor and Stage A: which batch size fills the GPU."""

from collections.abc import Iterator

from scripts.gpu_check.rows import Row, at_least
from scripts.gpu_check.sizes import Check
from scripts.gpu_check.training import Mode, measure_or_fail, measurement_rows

GAIN = 2.0
"""Samples per second with the medium batch relative to the small one, which is launch-bound."""


def rows(check: Check) -> Iterator[Row]:
    """The cost of each mode, and what a larger batch gains."""
    small, medium, large = check.size.stage_b_batches
    modes = [Mode(small), Mode(small, checkpointed=True), Mode(medium)]
    modes += [Mode(large, checkpointed=True), Mode(medium, compiled=True)]
    rates = {}
    for mode in modes:
        cost = measure_or_fail("b", mode, check.size)
        if isinstance(cost, Row):
            yield cost
            continue
        yield from measurement_rows("b", mode, check.size, cost)
        rates[mode] = cost.samples_per_second
    if Mode(small) in rates and Mode(medium) in rates:
        name = f"Stage B, eager: samples/s with batch {medium} relative to batch {small}"
        ratio = rates[Mode(medium)] / rates[Mode(small)]
        yield at_least(name, ratio, GAIN, "{:.2f}", judged=check.size.full)
