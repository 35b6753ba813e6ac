"""The endless order in which the samples of a source come: shuffled, filtered, and resumable.

Pass after pass over the shards, each in an order of its own. Shards are opened until a window holds
`shuffle_samples`, and the window is shuffled: a set that fits in one is shuffled perfectly, and of
a greater one nothing but a window is ever in memory. A position is three numbers, so that a run
resumes wherever it was by opening one window.
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

_EXAMPLES = 3  # of each kind of bad data that are shown
_AHEAD = 8  # shards that are opened in the background at most
_ENOUGH_SAMPLES, _ENOUGH_SHARDS = 1000, 20  # before a share of bad ones says anything


class EpochSample(NamedTuple):
    """A sample, and the pass over its group that it came in."""

    sample: Sample
    epoch: int


class Position(NamedTuple):
    """Where a stream is.

    Attributes:
        epoch: number of the pass.
        shard: number, within the order of that pass, of the window's first shard.
        place: how many samples of the window have been drawn.
    """

    epoch: int = 0
    shard: int = 0
    place: int = 0


class DataStats:
    """Counts what was seen, dropped and bad, and shows the first examples of what is bad.

    Args:
        show: whether to show examples.
        limit: share of bad samples, or of broken shards, at which `check` stops the run.

    Attributes:
        counts: "seen", "dropped/<filter>", "bad/<reason>", "shards", "shards/broken" and what the
            workers add.
    """

    def __init__(self, *, show: bool = True, limit: float = 1.0) -> None:
        self.counts: Counter[str] = Counter()
        self.limit = limit
        self.show = show
        self._shown: Counter[str] = Counter()

    def note_bad(self, bad: SampleError) -> None:
        """Count something bad, and show it if it is one of the first of its kind."""
        self.counts[f"bad/{bad.reason}"] += bad.count
        self._shown[bad.reason] += 1
        if self.show and self._shown[bad.reason] <= _EXAMPLES:
            more = " (further ones are only counted)" * (self._shown[bad.reason] == _EXAMPLES)
            warnings.warn(f"left out, {bad.reason}: {bad.where}{more}", stacklevel=2)

    def check(self, *, more_bad: int = 0, of_shards: int = 0) -> None:
        """Stop a run whose data are bad beyond the limit.

        Args:
            more_bad: samples found bad elsewhere, that were counted as seen here.
            of_shards: how many shards there are: of a few, one may be broken.

        Raises:
            ValueError: with a summary.
        """
        bad = sum(n for name, n in self.counts.items() if name.startswith("bad/"))
        shares = {
            "samples": (bad + more_bad, self.counts["seen"] + bad, _ENOUGH_SAMPLES),
            "shards": (self.counts["shards/broken"], self.counts["shards"], _ENOUGH_SHARDS),
        }
        if of_shards < _ENOUGH_SHARDS:
            del shares["shards"]
        for kind, (number, of, enough) in shares.items():
            if of >= enough and number > self.limit * of:
                found = f"; {more_bad} unreadable images" if more_bad else ""
                raise ValueError(
                    f"{number} of {of} {kind} are bad, more than data.max_bad_fraction="
                    f"{self.limit} ({self.summary()}{found}): fix the data, or raise "
                    "data.max_bad_fraction."
                )

    def summary(self) -> str:
        """Say in words what the counts are."""
        return format_counts(self.counts)


def format_counts(counts: Counter[str]) -> str:
    """Say in words what the counts of a `DataStats` are."""
    parts = [f"{counts['seen']} samples read from {counts['shards']} shards"]
    for kind in ("dropped", "bad"):
        found = [
            f"{n} {name.partition('/')[2]}"
            for name, n in sorted(counts.items())
            if name.startswith(f"{kind}/")
        ]
        if found:
            parts.append(f"{kind}: {', '.join(found)}")
    return "; ".join(parts)


class Stream:
    """Yields the samples of a group of shards, epoch after epoch.

    Args:
        opener: opens the shards.
        shards: their names.
        seed: of the order.
        shuffle_samples: least size of a window, unless a pass ends.
        filters: what to drop.
        holdout: what validation keeps.
        stats: counts.

    Raises:
        ValueError: a whole pass holds nothing to train on.
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
        # Image hash -> hash of the place of the sample that first had it.
        self.first_with: dict[int, int] = {}
        self._order: tuple[int, list[int]] = (-1, [])
        self._window: list[Sample] = []
        self._start = (0, 0)  # epoch and shard where the window begins
        self._end = 0  # shard where it ends
        self._place = 0
        self._found_any = False  # in this pass

    def __iter__(self) -> Iterator[EpochSample]:
        return self

    def __next__(self) -> EpochSample:
        # greater than that if the data have become fewer since the position was noted
        while self._place >= len(self._window):
            self._advance()
        self._place += 1
        return EpochSample(self._window[self._place - 1], self._start[0])

    def others(self, count: int) -> list[EpochSample]:
        """Return samples of the window other than the one yielded last."""
        size = len(self._window)
        places = [(self._place + i) % size for i in range(min(count, size - 1))]
        return [EpochSample(self._window[place], self._start[0]) for place in places]

    @property
    def position(self) -> Position:
        """Where the stream is; behind the last sample of a window, before the next one."""
        if self._window and self._place >= len(self._window):
            return Position(self._start[0], self._end)
        return Position(*self._start, self._place)

    def seek(self, position: Position) -> None:
        """Go to a position, counting nothing; opens one window."""
        if self.position == position and (self._window or position == Position()):
            return
        self._start = position[:2]
        self._window, self._end, self._found_any = [], position.shard, True
        if position.place:
            self._fill(DataStats(show=False))
        self._place = position.place
        if self._place > len(self._window):
            warnings.warn(
                "there are fewer samples than when the checkpoint was made: the order continues "
                "with the next window",
                stacklevel=2,
            )

    def _advance(self) -> None:
        """Fill the next window, which may epoch out empty."""
        epoch = self._start[0]
        if self._end >= len(self.shards):
            if not self._found_any:
                raise ValueError(f"data holds nothing to train on ({self.stats.summary()}).")
            epoch, self._end, self._found_any = epoch + 1, 0, False
        self._start, self._place = (epoch, self._end), 0
        self._fill(self.stats)
        self._found_any |= bool(self._window)

    def _fill(self, stats: DataStats) -> None:
        epoch, first = self._start
        order = self._order_of(epoch)
        names = [self.shards[i] for i in order]
        kept: list[Sample] = []
        held, self._end = 0, first
        # counted before the filters: a strict one makes windows smaller, not longer in coming
        while self._end < len(names) and held < self.shuffle_samples:
            opened = self.opener.open(names[self._end])
            held += len(opened.samples)
            kept += self._samples(opened, stats)
            self._end += 1
        mixed = permutation(len(kept), f"{self.seed}/window/{epoch}/{first}")
        self._window = [kept[i] for i in mixed]
        # As many shards as this window took will be wanted next.
        self.opener.expect(names[self._end : self._end + min(self._end - first, _AHEAD)])

    def _order_of(self, epoch: int) -> list[int]:
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
        image = sample.metadata.get(IMAGE_HASH)
        if image is None:
            return False
        # the shard's number: names may change when data move, and need not differ without a folder
        own = round(unit_hash(f"{self._numbers[sample.shard]}/{sample.key}") * 2**56)
        return self.first_with.setdefault(int(image), own) != own


class Mixture:
    """Samples from several streams, in proportion to weights.

    Args:
        streams: at least one.
        weights: one for each, above 0.
        seed: of the draws.
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
            chance = unit_hash(f"{self.seed}/source/{self.drawn}")
            self.last = next(
                (s for s, end in zip(self.streams, self._ends, strict=True) if chance < end),
                self.streams[-1],
            )
        self.drawn += 1
        return next(self.last)
