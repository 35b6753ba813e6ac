"""The endless order of a source's samples: shuffled, filtered and resumable.

Each epoch visits the shards in a different order. Shards are opened until a window contains
``shuffle_samples``, and the window is shuffled: a set that fits in one window is shuffled
perfectly, and of a larger one only a window is in memory. A position is three numbers, so a run
resumes anywhere by opening one window.
"""

import warnings
from collections.abc import Iterator
from typing import NamedTuple

from wuerstchen_pl.data.ordering.filters import Filters
from wuerstchen_pl.data.ordering.prefetch import ShardPrefetcher
from wuerstchen_pl.data.ordering.selection import SampleSelector
from wuerstchen_pl.data.ordering.stats import DataStats
from wuerstchen_pl.data.sources.source import Holdout, Sample, permutation, unit_hash

_AHEAD = 8  # maximum number of shards opened in the background


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
        self.shuffle_samples = shuffle_samples
        self.selector = SampleSelector(filters, shards=shards)
        self.holdout, self.stats = holdout, stats
        self._order: tuple[int, list[int]] = (-1, [])
        self._window: list[Sample] = []
        self._start = (0, 0)  # epoch and first shard of the window
        self._end = 0  # end of the window's shards, exclusive
        self._offset = 0
        self._epoch_has_samples = False

    def __iter__(self) -> Iterator[EpochSample]:
        return self

    def __next__(self) -> EpochSample:
        # It may exceed the length after ``seek``, if the data have shrunk since.
        while self._offset >= len(self._window):
            self._advance()
        self._offset += 1
        return EpochSample(self._window[self._offset - 1], self._start[0])

    def other_samples(self, count: int) -> list[EpochSample]:
        """Up to ``count`` samples of the window, without the last one yielded."""
        size = len(self._window)
        indices = [(self._offset + i) % size for i in range(min(count, size - 1))]
        return [EpochSample(self._window[index], self._start[0]) for index in indices]

    @property
    def position(self) -> Position:
        """The current position; at the end of a window, the start of the next one."""
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
                raise ValueError(self.selector.explain_empty(self.stats))
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
            kept += self.selector.samples(opened, holdout=self.holdout, stats=stats)
            self._end += 1
        shuffled = permutation(len(kept), f"{self.seed}/window/{epoch}/{first}")
        self._window = [kept[i] for i in shuffled]
        # The next window will need about as many shards.
        self.opener.expect(names[self._end : self._end + min(self._end - first, _AHEAD)])

    def _shard_order(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            self._order = epoch, permutation(len(self.shards), f"{self.seed}/shards/{epoch}")
        return self._order[1]


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
