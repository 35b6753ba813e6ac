"""Aspect buckets: which sizes a batch may have, and the order of the batches.

The order is a pure function of a seed and a position, so that a run resumes at any batch at once,
whatever the number of workers, and every rank knows the part of the others.
"""

import bisect
import hashlib
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch

Size = tuple[int, int]  # (height, width) in pixels

# Width / height, from 1:2 to 2:1. What falls between two of them is cropped to the nearer one.
DEFAULT_RATIOS = (1 / 2, 4 / 7, 2 / 3, 3 / 4, 4 / 5, 1.0, 5 / 4, 4 / 3, 3 / 2, 7 / 4, 2.0)


def bucket_sizes(
    image_size: int, multiple: int, ratios: Sequence[float] | None = None
) -> list[Size]:
    """List the sizes of batches, sorted, each once.

    Args:
        image_size: side in pixels of the square that every size has about the area of.
        multiple: both sides are multiples of this many pixels.
        ratios: wanted width / height; None takes DEFAULT_RATIOS.

    Raises:
        ValueError: `multiple` does not divide `image_size`, or a ratio is not positive.
    """
    if multiple < 1:
        raise ValueError(f"data.bucket_multiple is {multiple} pixels: give 1 or more.")
    if image_size < multiple or image_size % multiple:
        lower = max(image_size // multiple, 1) * multiple
        raise ValueError(
            f"data.image_size is {image_size} pixels, not a multiple of "
            f"data.bucket_multiple={multiple}: give {lower} or {lower + multiple}."
        )
    chosen = DEFAULT_RATIOS if ratios is None else tuple(ratios)
    if not chosen or min(chosen) <= 0:
        raise ValueError(
            f"data.ratios is {list(chosen)}: give widths over heights above 0, "
            "such as [0.5, 1.0, 2.0], or null for the usual ones."
        )

    def side(length: float) -> int:
        return max(round(length / multiple), 1) * multiple

    return sorted(
        {(side(image_size / math.sqrt(r)), side(image_size * math.sqrt(r))) for r in chosen}
    )


def nearest(width: int, height: int, sizes: Sequence[Size]) -> Size:
    """Return the size whose ratio is nearest to a picture's, by the logarithm of the ratio."""
    wanted = math.log(width / height)
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - wanted))


class BucketBatches:
    """The endless order of training batches of one rank.

    A bucket of n samples is an endless stream: a random permutation of it (pass 0), another one
    (pass 1), and so on. Its batch j takes the items [j B, (j + 1) B) of that stream, where
    B = batch_size * world_size, and rank r takes the r-th part of these. Thus the leftovers of a
    pass open the next one, nothing is lost, and every rank takes equally many steps. Until the end
    of pass e the bucket gives floor((e + 1) n / B) batches; those of one pass are mixed over the
    buckets at random.
    """

    def __init__(
        self,
        *,
        buckets: dict[Size, list[int]],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Prepare the order; nothing is drawn yet.

        Args:
            buckets: the indices of the samples of each size; empty ones are ignored.
            batch_size: samples of one batch of one rank.
            seed: of the order.
            rank: of this process, in [0, world_size).
            world_size: number of processes that share each batch.

        Raises:
            ValueError: there is no sample, or a number is out of its range.
        """
        if batch_size < 1:
            raise ValueError(f"data.batch_size is {batch_size}: give 1 or more.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} of {world_size} processes: give 0 to world_size - 1.")
        self.buckets = {size: items for size, items in sorted(buckets.items()) if items}
        if not self.buckets:
            raise ValueError(
                "data.source holds no training sample: "
                "add samples or lower data.source.val_fraction."
            )
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.global_batch = batch_size * world_size
        # Two passes of each bucket are in use where they meet.
        self._permutation = lru_cache(maxsize=2 * len(self.buckets))(self._draw_permutation)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch: constant; leftovers move to the next one."""
        return max(1, sum(map(len, self.buckets.values())) // self.global_batch)

    def batches(self, start: int = 0) -> Iterator[tuple[Size, list[int]]]:
        """Yield this rank's (size, indices of the samples) for ever, from batch `start` on."""
        current = self._pass_of(start)
        position = self._batches_before(current)
        while True:
            for size, number in self._batches_of_pass(current):
                if position >= start:
                    yield size, self._items(size, number)
                position += 1
            current += 1

    def _items(self, size: Size, number: int) -> list[int]:
        items = self.buckets[size]
        first = number * self.global_batch + self.rank * self.batch_size
        places = (divmod(place, len(items)) for place in range(first, first + self.batch_size))
        return [items[self._permutation(size, turn)[rest]] for turn, rest in places]

    def _batches_of_pass(self, current: int) -> list[tuple[Size, int]]:
        """List (size, number of the batch within its bucket) of a pass over the data, mixed."""
        sizes, numbers = [], {}
        for size, items in self.buckets.items():
            first = current * len(items) // self.global_batch
            last = (current + 1) * len(items) // self.global_batch
            sizes += [size] * (last - first)
            numbers[size] = iter(range(first, last))
        order = _permutation(len(sizes), f"{self.seed}/mix/{current}")
        return [(sizes[place], next(numbers[sizes[place]])) for place in order]

    def _batches_before(self, current: int) -> int:
        return sum(current * len(items) // self.global_batch for items in self.buckets.values())

    def _pass_of(self, position: int) -> int:
        """Return the pass that holds a batch: the last one with at most `position` before it."""
        total = sum(map(len, self.buckets.values()))
        # Every bucket holds back less than one batch, which bounds the pass from above.
        bound = (position + len(self.buckets) + 1) * self.global_batch // total + 2
        return bisect.bisect_right(range(bound), position, key=self._batches_before) - 1

    def _draw_permutation(self, size: Size, turn: int) -> list[int]:
        name = f"{self.seed}/{size[0]}x{size[1]}/{turn}"
        return _permutation(len(self.buckets[size]), name)


def validation_batches(
    buckets: dict[Size, list[int]], batch_size: int, rank: int = 0, world_size: int = 1
) -> list[tuple[Size, list[int]]]:
    """List (size, indices) so that each sample comes exactly once, unshuffled.

    The fullest bucket comes first. The last batch of a bucket may be smaller. With several ranks a
    batch is dealt out in turns; a rank that would get nothing repeats its first sample, as ranks
    must take equally many steps.
    """
    found = []
    for size, items in sorted(buckets.items(), key=lambda bucket: (-len(bucket[1]), bucket[0])):
        for start in range(0, len(items), batch_size * world_size):
            chunk = items[start : start + batch_size * world_size]
            found.append((size, chunk[rank::world_size] or chunk[:1]))
    return found


def _permutation(length: int, name: str) -> list[int]:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()
