"""What of a source is for training, and what for validation; who goes through it shard by shard."""

from collections import Counter
from itertools import zip_longest
from typing import Any

import torch

from wuerstchen_pl.data.ordering.buckets import Buckets
from wuerstchen_pl.data.ordering.filters import Filters
from wuerstchen_pl.data.ordering.prefetch import IMAGE_HASH, ShardPrefetcher
from wuerstchen_pl.data.ordering.stream import DataStats
from wuerstchen_pl.data.sources.source import (
    Holdout,
    Sample,
    ShardIndex,
    Source,
    Split,
    permutation,
)

_AHEAD = 4  # shards that are opened before they are needed


class Splits:
    """The two splits of a source, as far as they can be known by opening its first shards.

    Args:
        source: ready on disk.
        filters: what is dropped.
        buckets: the sizes of batches.
        max_upscale: an image that had to be enlarged further is dropped; None takes all.
        val_fraction: share that validation keeps of a source without a validation split.
        window: samples up to which shards are opened.
        max_bad_fraction: limit of the stats.

    Attributes:
        opener: opens the shards; those that fit in the window stay open.
        holdout: tells what validation keeps.
        first: for each split the samples of the first shards, of a small set all.
        epoch_samples: how many training samples there are: exact when all shards are open, else
            the others are taken to hold as many on average.
        stats: counts what `samples_of` sees and leaves out.
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
        max_bad_fraction: float = 1.0,
    ) -> None:
        self.source, self.filters, self.buckets = source, filters, buckets
        self.max_upscale, self.window = max_upscale, window
        self.opener = ShardPrefetcher(source, keep=window, hashes=filters.deduplicate)
        self.stats = DataStats(limit=max_bad_fraction)
        self._first_with: dict[float, str] = {}
        shards, own = self.shards("train"), self.shards("val")
        found, opened = self._first_window(shards)
        self.holdout = Holdout(0 if own else val_fraction, [s.group_key for s in found])
        kept = [s for s in found if s in self.holdout]
        self.first: dict[Split, list[Sample]] = {
            "train": [s for s in found if s not in self.holdout],
            "val": self._first_window(own)[0] if own else kept,
        }
        self.epoch_samples = round(len(self.first["train"]) / max(1, opened) * len(shards))
        self._agree()

    def _agree(self) -> None:
        """Take rank 0's findings: one that could not reach a shard would take other steps."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            findings: list[Any] = [(self.first["val"], self.epoch_samples)]
            torch.distributed.broadcast_object_list(findings, src=0)
            self.first["val"], self.epoch_samples = findings[0]

    def shards(self, split: Split) -> list[str]:
        """Name the shards of a split; of several groups in turn, so that all are met early."""
        epochs = zip_longest(*(group.shards for group in self.source.groups(split)))
        return [shard for epoch in epochs for shard in epoch if shard is not None]

    def samples_of(self, opened: ShardIndex) -> list[Sample]:
        """List what training takes of an opened shard, and count."""
        self.stats.counts["shards"] += 1
        self.stats.counts["shards/broken"] += opened.broken
        for bad in opened.bad:
            self.stats.note_bad(bad)
        found = []
        for sample in opened.samples:
            if sample in self.holdout:
                continue
            self.stats.counts["seen"] += 1
            passed = self._passing(sample)
            if isinstance(passed, Sample) and self._is_duplicate(passed):
                passed = "duplicate"
            if isinstance(passed, str):
                self.stats.counts[f"dropped/{passed}"] += 1
            else:
                found.append(passed)
        self.stats.check(of_shards=len(self.shards("train")))
        return found

    def _is_duplicate(self, sample: Sample) -> bool:
        image = sample.metadata.get(IMAGE_HASH)
        return image is not None and self._first_with.setdefault(image, sample.name) != sample.name

    def _first_window(self, shards: list[str]) -> tuple[list[Sample], int]:
        """Return what passes of the first shards, as many as a window takes, and their number."""
        # Any shards, and not the first ones: what a list lacks is often missing in a row.
        order = permutation(len(shards), "first")
        found: dict[int, list[Sample]] = {}
        held = 0
        for place, number in enumerate(order):
            if held >= self.window:
                break
            self.opener.expect(shards[i] for i in order[place : place + _AHEAD])
            samples = self.opener.open(shards[number]).samples
            held += len(samples)
            passed = map(self._passing, samples)
            found[number] = [sample for sample in passed if isinstance(sample, Sample)]
        listed = [sample for number in sorted(found) for sample in found[number]]
        if held >= self.window and not listed:
            dropped = Counter(str(self._passing(s)) for s in samples).most_common(1)[0][0]
            raise ValueError(
                f"of the first {held} samples none passes data.filters and data.max_upscale, most "
                f"for {dropped}: lower what they ask."
            )
        return listed, len(found)

    def _passing(self, sample: Sample) -> Sample | str:
        """Return a sample as the filters leave it, or what drops it."""
        passed = self.filters.apply(sample)
        if isinstance(passed, Sample) and self.max_upscale:
            return "max_upscale" if self.buckets.enlargement(passed) > self.max_upscale else passed
        return passed
