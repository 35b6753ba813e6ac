"""Splits a source into training and validation samples, after opening its first shards."""

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

_AHEAD = 4  # shards opened in the background


class Splits:
    """The training and validation splits of a source, from the first window of samples of each.

    Args:
        source: a prepared source.
        filters: filters to apply.
        buckets: the possible sizes of batches.
        max_upscale: images that would be upscaled more are dropped; None keeps all.
        val_fraction: share to hold out of a source without a validation split.
        window: number of samples up to which shards are opened.
        max_bad_fraction: share of bad samples or shards above which `samples_of` raises.

    Attributes:
        opener: opens the shards; those that fit in the window stay cached.
        holdout: the samples held out for validation.
        first_window: for each split the samples of the first shards; all of a small set.
        epoch_samples: number of training samples: exact if all shards were opened, otherwise
            extrapolated from the opened ones.
        stats: counts of `samples_of`.
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
        self._first_by_hash: dict[float, str] = {}
        train_shards, val_shards = self.shards("train"), self.shards("val")
        samples, num_opened = self._read_window(train_shards)
        self.holdout = Holdout(0 if val_shards else val_fraction, [s.group_key for s in samples])
        held_out = [s for s in samples if s in self.holdout]
        self.first_window: dict[Split, list[Sample]] = {
            "train": [s for s in samples if s not in self.holdout],
            "val": self._read_window(val_shards)[0] if val_shards else held_out,
        }
        num_train = len(self.first_window["train"])
        self.epoch_samples = round(num_train / max(1, num_opened) * len(train_shards))
        self._broadcast_from_rank_zero()

    def _broadcast_from_rank_zero(self) -> None:
        """Use rank 0's result: a rank that missed a shard would take another number of steps."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            shared: list[Any] = [(self.first_window["val"], self.epoch_samples)]
            torch.distributed.broadcast_object_list(shared, src=0)
            self.first_window["val"], self.epoch_samples = shared[0]

    def shards(self, split: Split) -> list[str]:
        """List the shards of a split, alternating between groups so that each is covered early."""
        rounds = zip_longest(*(group.shards for group in self.source.groups(split)))
        return [shard for one_round in rounds for shard in one_round if shard is not None]

    def samples_of(self, opened: ShardIndex) -> list[Sample]:
        """List the training samples of an opened shard, and update the stats."""
        self.stats.counts["shards"] += 1
        self.stats.counts["shards/broken"] += opened.broken
        for bad in opened.bad:
            self.stats.note_bad(bad)
        kept = []
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
                kept.append(passed)
        self.stats.check(of_shards=len(self.shards("train")))
        return kept

    def _is_duplicate(self, sample: Sample) -> bool:
        image_hash = sample.metadata.get(IMAGE_HASH)
        if image_hash is None:
            return False
        return self._first_by_hash.setdefault(image_hash, sample.name) != sample.name

    def _read_window(self, shards: list[str]) -> tuple[list[Sample], int]:
        """Open shards up to a window; return their passing samples and the number of shards."""
        # Random shards instead of the first ones: missing shards are often consecutive.
        order = permutation(len(shards), "first")
        passing: dict[int, list[Sample]] = {}
        num_samples = 0
        for i, number in enumerate(order):
            if num_samples >= self.window:
                break
            self.opener.expect(shards[j] for j in order[i : i + _AHEAD])
            samples = self.opener.open(shards[number]).samples
            num_samples += len(samples)
            passed = map(self._passing, samples)
            passing[number] = [sample for sample in passed if isinstance(sample, Sample)]
        listed = [sample for number in sorted(passing) for sample in passing[number]]
        if num_samples >= self.window and not listed:
            dropped = Counter(str(self._passing(s)) for s in samples).most_common(1)[0][0]
            raise ValueError(
                f"none of the first {num_samples} samples passes data.filters and data.max_upscale "
                f"(most often because of {dropped}); relax these."
            )
        return listed, len(passing)

    def _passing(self, sample: Sample) -> Sample | str:
        """Return the filtered sample, or the name of the filter that drops it."""
        passed = self.filters.apply(sample)
        if isinstance(passed, Sample) and self.max_upscale:
            return "max_upscale" if self.buckets.enlargement(passed) > self.max_upscale else passed
        return passed
