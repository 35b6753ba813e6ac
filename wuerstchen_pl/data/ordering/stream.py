"""The endless order of a source's samples: shuffled, filtered and resumable.

Each epoch visits the shards in a different order. Shards are opened until a window contains
`shuffle_samples`, and the window is shuffled: a set that fits in one window is shuffled perfectly,
and of a larger one only a window is in memory. A position is three numbers, so a run resumes
anywhere by opening one window.
"""

import warnings
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from wuerstchen_pl.data.ordering.filters import Filters
from wuerstchen_pl.data.ordering.prefetch import IMAGE_HASH, ShardPrefetcher
from wuerstchen_pl.data.sources.source import (
    Holdout,
    Sample,
    SampleError,
    ShardIndex,
    permutation,
    unit_hash,
)

_EXAMPLES = 3  # warnings per kind of bad data
_AHEAD = 8  # maximum number of shards opened in the background
_ENOUGH_SAMPLES, _ENOUGH_SHARDS = 1000, 20  # minimum counts for a meaningful share of bad ones


class EpochSample(NamedTuple):
    """A sample, and the epoch of its shard group that it belongs to."""

    sample: Sample
    epoch: int


class Position(NamedTuple):
    """The position of a stream.

    Attributes:
        epoch: number of the epoch.
        shard: index of the window's first shard in the order of that epoch.
        offset: number of samples drawn from the window.
    """

    epoch: int = 0
    shard: int = 0
    offset: int = 0


class DataStats:
    """Counts seen, dropped and bad samples, and warns with the first examples of bad ones.

    Args:
        show: whether to warn with examples.
        limit: share of bad samples, or of broken shards, above which `check` raises.

    Attributes:
        counts: "seen", "dropped/<filter>", "bad/<reason>", "shards", "shards/broken" and those of
            the workers.
    """

    def __init__(self, *, show: bool = True, limit: float = 1.0) -> None:
        self.counts: Counter[str] = Counter()
        self.limit = limit
        self.show = show
        self._shown: Counter[str] = Counter()

    def note_bad(self, bad: SampleError) -> None:
        """Count bad samples, and warn if they are among the first of their kind."""
        self.counts[f"bad/{bad.reason}"] += bad.count
        self._shown[bad.reason] += 1
        if self.show and self._shown[bad.reason] <= _EXAMPLES:
            suffix = " (further ones are only counted)" * (self._shown[bad.reason] == _EXAMPLES)
            warnings.warn(f"skipped, {bad.reason}: {bad.where}{suffix}", stacklevel=2)

    def check(self, *, more_bad: int = 0, of_shards: int = 0) -> None:
        """Raise if the share of bad data exceeds the limit.

        Args:
            more_bad: bad samples counted elsewhere, which are counted as seen here.
            of_shards: total number of shards; broken ones are ignored if there are only a few.

        Raises:
            ValueError: the limit is exceeded; the message includes a summary.
        """
        bad = sum(n for name, n in self.counts.items() if name.startswith("bad/"))
        shares = {
            "samples": (bad + more_bad, self.counts["seen"] + bad, _ENOUGH_SAMPLES),
            "shards": (self.counts["shards/broken"], self.counts["shards"], _ENOUGH_SHARDS),
        }
        if of_shards < _ENOUGH_SHARDS:
            del shares["shards"]
        for kind, (number, total, enough) in shares.items():
            if total >= enough and number > self.limit * total:
                unreadable = f"; {more_bad} unreadable images" if more_bad else ""
                raise ValueError(
                    f"{number} of {total} {kind} are bad, more than data.max_bad_fraction="
                    f"{self.limit} ({self.summary()}{unreadable}); fix the data, or raise "
                    "data.max_bad_fraction."
                )

    def summary(self) -> str:
        """Format the counts as text."""
        return format_counts(self.counts)


def format_counts(counts: Counter[str]) -> str:
    """Format the counts of a `DataStats` as text."""
    parts = [f"{counts['seen']} samples read from {counts['shards']} shards"]
    for kind in ("dropped", "bad"):
        items = [
            f"{n} {name.partition('/')[2]}"
            for name, n in sorted(counts.items())
            if name.startswith(f"{kind}/")
        ]
        if items:
            parts.append(f"{kind}: {', '.join(items)}")
    return "; ".join(parts)


class Stream:
    """Yields the samples of a group of shards, epoch after epoch.

    Args:
        opener: opens the shards.
        shards: names of the shards.
        seed: random seed of the order.
        shuffle_samples: minimum size of a window, except the last one of an epoch.
        filters: filters to apply.
        holdout: samples to exclude for validation.
        stats: counts to update.

    Raises:
        ValueError: a full epoch yields no sample.
    """

    def __init__(
        self,
        *,
        opener: ShardPrefetcher,
        shards: list[str],
        seed: int,
        shuffle_samples: int,
        filters: Filters,
        holdout: Holdout,
        stats: DataStats,
    ) -> None:
        self.opener, self.shards, self.seed = opener, shards, seed
        self.shuffle_samples, self.filters = shuffle_samples, filters
        self.holdout, self.stats = holdout, stats
        self._numbers = {shard: number for number, shard in enumerate(shards)}
        # Image hash -> hash of the first sample with that image.
        self.first_by_hash: dict[int, int] = {}
        self._order: tuple[int, list[int]] = (-1, [])
        self._window: list[Sample] = []
        self._start = (0, 0)  # epoch and first shard of the window
        self._end = 0  # end of the window's shards, exclusive
        self._offset = 0
        self._epoch_has_samples = False

    def __iter__(self) -> Iterator[EpochSample]:
        return self

    def __next__(self) -> EpochSample:
        # It may exceed the length after `seek`, if the data have shrunk since.
        while self._offset >= len(self._window):
            self._advance()
        self._offset += 1
        return EpochSample(self._window[self._offset - 1], self._start[0])

    def other_samples(self, count: int) -> list[EpochSample]:
        """Return up to `count` samples of the window, without the last yielded one."""
        size = len(self._window)
        indices = [(self._offset + i) % size for i in range(min(count, size - 1))]
        return [EpochSample(self._window[index], self._start[0]) for index in indices]

    @property
    def position(self) -> Position:
        """The current position; at the end of a window that of the start of the next one."""
        if self._window and self._offset >= len(self._window):
            return Position(self._start[0], self._end)
        return Position(*self._start, self._offset)

    def seek(self, position: Position) -> None:
        """Move to a position without updating the stats; opens at most one window."""
        if self.position == position and (self._window or position == Position()):
            return
        self._start = position[:2]
        self._window, self._end, self._epoch_has_samples = [], position.shard, True
        if position.offset:
            self._fill(DataStats(show=False))
        self._offset = position.offset
        if self._offset > len(self._window):
            warnings.warn(
                "there are fewer samples than when the checkpoint was saved; resuming at the next "
                "window",
                stacklevel=2,
            )

    def _advance(self) -> None:
        """Fill the next window, which may turn out empty."""
        epoch = self._start[0]
        if self._end >= len(self.shards):
            if not self._epoch_has_samples:
                raise ValueError(
                    f"there is nothing to train on ({self.stats.summary()}); check data and "
                    "data.filters."
                )
            epoch, self._end, self._epoch_has_samples = epoch + 1, 0, False
        self._start, self._offset = (epoch, self._end), 0
        self._fill(self.stats)
        self._epoch_has_samples |= bool(self._window)

    def _fill(self, stats: DataStats) -> None:
        epoch, first = self._start
        order = self._shard_order(epoch)
        names = [self.shards[i] for i in order]
        kept: list[Sample] = []
        num_samples, self._end = 0, first
        # Counted before filtering: strict filters give smaller windows, not more shards to open.
        while self._end < len(names) and num_samples < self.shuffle_samples:
            opened = self.opener.open(names[self._end])
            num_samples += len(opened.samples)
            kept += self._samples(opened, stats)
            self._end += 1
        shuffled = permutation(len(kept), f"{self.seed}/window/{epoch}/{first}")
        self._window = [kept[i] for i in shuffled]
        # The next window will need about as many shards.
        self.opener.expect(names[self._end : self._end + min(self._end - first, _AHEAD)])

    def _shard_order(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            self._order = epoch, permutation(len(self.shards), f"{self.seed}/shards/{epoch}")
        return self._order[1]

    def _samples(self, opened: ShardIndex, stats: DataStats) -> Iterator[Sample]:
        stats.counts["shards"] += 1
        stats.counts["shards/broken"] += opened.broken
        for bad in opened.bad:
            stats.note_bad(bad)
        for sample in opened.samples:
            if sample in self.holdout:
                continue
            stats.counts["seen"] += 1
            result = self.filters.apply(sample)
            if isinstance(result, Sample) and self._is_duplicate(sample):
                result = "duplicate"
            if isinstance(result, str):
                stats.counts[f"dropped/{result}"] += 1
            else:
                yield result
        stats.check(of_shards=len(self.shards))

    def _is_duplicate(self, sample: Sample) -> bool:
        image_hash = sample.metadata.get(IMAGE_HASH)
        if image_hash is None:
            return False
        # By shard number: names change when data are moved, and may repeat between folders.
        sample_hash = round(unit_hash(f"{self._numbers[sample.shard]}/{sample.key}") * 2**56)
        return self.first_by_hash.setdefault(int(image_hash), sample_hash) != sample_hash


class Mixture:
    """Samples from several streams, in proportion to weights.

    Args:
        streams: at least one stream.
        weights: one weight above 0 per stream.
        seed: random seed of the draws.
    """

    def __init__(self, streams: list[Stream], weights: list[float], *, seed: int) -> None:
        self.streams, self.seed = streams, seed
        total = sum(weights)
        self._ends = [sum(weights[: i + 1]) / total for i in range(len(weights))]
        self.drawn = 0
        self.last = streams[0]

    def __iter__(self) -> Iterator[EpochSample]:
        return self

    def __next__(self) -> EpochSample:
        if len(self.streams) > 1:
            threshold = unit_hash(f"{self.seed}/source/{self.drawn}")
            self.last = next(
                (s for s, end in zip(self.streams, self._ends, strict=True) if threshold < end),
                self.streams[-1],
            )
        self.drawn += 1
        return next(self.last)
