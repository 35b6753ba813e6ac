import math
from collections import Counter
from itertools import islice

import pytest

from wuerstchen_pl.data.buckets import (
    BucketBatches,
    bucket_sizes,
    nearest,
    validation_batches,
)

BUCKETS = {(4, 4): list(range(23)), (2, 8): list(range(23, 28)), (8, 2): list(range(28, 41))}


def order(rank: int = 0, world_size: int = 1, seed: int = 0, batch_size: int = 2) -> BucketBatches:
    return BucketBatches(
        buckets=BUCKETS, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size
    )


@pytest.mark.parametrize(("image_size", "multiple"), [(64, 16), (512, 32), (1024, 64)])
def test_sizes_keep_the_area_and_the_multiple(image_size: int, multiple: int) -> None:
    sizes = bucket_sizes(image_size, multiple)
    assert len(set(sizes)) == len(sizes)
    assert (image_size, image_size) in sizes
    assert sizes == sorted((width, height) for height, width in sizes)  # landscape as portrait
    shortest = min(min(size) for size in sizes)
    # Rounding moves each side by half a multiple at most.
    worst = 2 * math.log(shortest / (shortest - multiple / 2))
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert abs(math.log(height * width / image_size**2)) <= worst


def test_size_that_is_no_multiple_is_refused_with_both_neighbours() -> None:
    with pytest.raises(ValueError, match=r"data\.image_size is 100 .* give 96 or 128"):
        bucket_sizes(100, 32)
    with pytest.raises(ValueError, match=r"data\.ratios is \[-1\.0\]"):
        bucket_sizes(64, 32, [-1.0])


def test_nearest_is_symmetric_in_the_logarithm() -> None:
    sizes = [(64, 64), (64, 128), (128, 64)]
    border = math.sqrt(2)
    assert nearest(round(1000 * border) - 2, 1000, sizes) == (64, 64)
    assert nearest(round(1000 * border) + 2, 1000, sizes) == (64, 128)
    assert nearest(1000, round(1000 * border) + 2, sizes) == (128, 64)


@pytest.mark.parametrize("world_size", [1, 3])
def test_each_pass_takes_every_sample_once_and_leftovers_open_the_next(world_size: int) -> None:
    ranks = [order(rank, world_size).batches() for rank in range(world_size)]
    taken: dict[tuple[int, int], list[int]] = {size: [] for size in BUCKETS}
    found: dict[tuple[tuple[int, int], int], list[int]] = {}
    for number, parts in enumerate(islice(zip(*ranks, strict=True), 200)):
        sizes = {size for size, _ in parts}
        assert len(sizes) == 1, f"ranks disagree on the size of batch {number}"
        assert all(len(items) == 2 for _, items in parts)
        size = sizes.pop()
        found[size, len(taken[size])] = items = [item for _, part in parts for item in part]
        taken[size] += items
    for size, members in BUCKETS.items():
        passes = [
            taken[size][start : start + len(members)]
            for start in range(0, len(taken[size]) - len(members) + 1, len(members))
        ]
        assert len(passes) > 3
        # Batches of a pass come in the order of the stream, so that each pass is contiguous.
        assert all(sorted(one) == members for one in passes)
        assert passes[0] != passes[1]


def test_number_of_batches_of_a_pass_is_the_closed_form() -> None:
    counts: Counter[int] = Counter()
    total = sum(len(items) * 12 // 8 for items in BUCKETS.values())
    for size, _ in islice(order(batch_size=8).batches(), total):
        counts[len(BUCKETS[size])] += 1
    assert counts == {n: 12 * n // 8 for n in (23, 5, 13)}


@pytest.mark.parametrize("batch_size", [1, 2, 8, 64])
def test_order_resumes_at_any_position(batch_size: int) -> None:
    whole = list(islice(order(batch_size=batch_size).batches(), 60))
    for start in range(60):
        tail = list(islice(order(batch_size=batch_size).batches(start), 60 - start))
        assert tail == whole[start:]


def test_buckets_are_mixed_and_seeds_differ() -> None:
    first = list(islice(order().batches(), 20))
    assert len({size for size, _ in first[:8]}) > 1
    assert first != list(islice(order(seed=1).batches(), 20))
    assert first == list(islice(order().batches(), 20))


def test_epoch_length_is_the_same_on_every_rank() -> None:
    assert {order(rank, 4).steps_per_epoch for rank in range(4)} == {41 // 8}
    assert order(batch_size=64).steps_per_epoch == 1


def test_no_sample_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no training sample"):
        BucketBatches(buckets={(4, 4): []}, batch_size=2, seed=0)


def test_validation_takes_each_sample_once_in_order() -> None:
    batches = validation_batches(BUCKETS, 4)
    items = [item for _, part in batches for item in part]
    assert sorted(items) == list(range(41))
    for size, part in batches:
        assert set(part) <= set(BUCKETS[size])
    per_rank = [validation_batches(BUCKETS, 4, rank, 3) for rank in range(3)]
    assert len({len(batches) for batches in per_rank}) == 1
    assert {item for batches in per_rank for _, part in batches for item in part} == set(range(41))
