"""What of a source is for training, and what for validation; who goes through it shard by shard."""

from itertools import zip_longest

from wuerstchen_pl.data.buckets import Buckets, enlargement
from wuerstchen_pl.data.filters import Filters
from wuerstchen_pl.data.opener import Opener
from wuerstchen_pl.data.source import Holdout, Sample, Source, Split
from wuerstchen_pl.data.stream import Ledger

_AHEAD = 4  # shards that are opened before they are needed


class Splits:
    """The two splits of a source, as far as they can be known by opening its first shards.

    Args:
        source: ready on disk.
        filters: what is dropped.
        buckets: the sizes of batches.
        max_upscale: a picture that had to be enlarged further is dropped; None takes all.
        val_fraction: share that validation keeps of a source without a validation split.
        window: samples up to which shards are opened.

    Attributes:
        opener: opens the shards; those that fit in the window stay open.
        holdout: tells what validation keeps.
        first: for each split the samples of the first shards, of a small set all.
        epoch_samples: how many training samples there are: exact when all shards are open, else
            the others are taken to hold as many on average.
        ledger: counts what `samples_of` sees and leaves out.
    """

    def __init__(
        self,
        source: Source,
        *,
        filters: Filters,
        buckets: Buckets,
        max_upscale: float | None,
        val_fraction: float,
        window: int,
    ) -> None:
        self.source, self.filters, self.buckets = source, filters, buckets
        self.max_upscale, self.window = max_upscale, window
        self.opener = Opener(source, keep=window, hashes=filters.deduplicate)
        self.ledger = Ledger()
        shards, own = self.shards("train"), self.shards("val")
        found, opened = self._first_window(shards)
        self.holdout = Holdout(0 if own else val_fraction, [s.family for s in found])
        kept = [s for s in found if s in self.holdout]
        self.first: dict[Split, list[Sample]] = {
            "train": [s for s in found if s not in self.holdout],
            "val": self._first_window(own)[0] if own else kept,
        }
        self.epoch_samples = round(len(self.first["train"]) / max(1, opened) * len(shards))

    def shards(self, split: Split) -> list[str]:
        """Name the shards of a split; of several groups by turns, so that all are met early."""
        turns = zip_longest(*(group.shards for group in self.source.groups(split)))
        return [shard for turn in turns for shard in turn if shard is not None]

    def samples_of(self, shard: str) -> list[Sample]:
        """List what training takes of a shard, and count."""
        opened = self.opener.open(shard)
        self.ledger.counts["shards"] += 1
        for bad in opened.bad:
            self.ledger.note_bad(bad)
        found = []
        for sample in opened.samples:
            if sample in self.holdout:
                continue
            self.ledger.counts["seen"] += 1
            passed = self._passing(sample)
            if isinstance(passed, str):
                self.ledger.counts[f"dropped/{passed}"] += 1
            else:
                found.append(passed)
        return found

    def _first_window(self, shards: list[str]) -> tuple[list[Sample], int]:
        """Return what passes of the first shards, as many as a window takes, and their number."""
        found: list[Sample] = []
        for number, shard in enumerate(shards):
            if len(found) >= self.window:
                return found, number
            self.opener.expect(shards[number : number + _AHEAD])
            passed = map(self._passing, self.opener.open(shard).samples)
            found += [sample for sample in passed if isinstance(sample, Sample)]
        return found, len(shards)

    def _passing(self, sample: Sample) -> Sample | str:
        """Return a sample as the filters leave it, or what drops it."""
        passed = self.filters.apply(sample)
        if isinstance(passed, Sample) and self.max_upscale:
            size = self.buckets.place(passed, 0)
            return "max_upscale" if enlargement(passed, size) > self.max_upscale else passed
        return passed
