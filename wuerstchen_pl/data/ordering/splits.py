"""Splits a source into training and validation samples, after opening its first shards."""

from collections.abc import Iterator
from itertools import chain, zip_longest
from typing import Any

import torch

from wuerstchen_pl.data.ordering.buckets import Buckets
from wuerstchen_pl.data.ordering.filters import Filters
from wuerstchen_pl.data.ordering.prefetch import ShardPrefetcher
from wuerstchen_pl.data.ordering.selection import SampleSelector
from wuerstchen_pl.data.ordering.stats import DataStats
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
        max_bad_fraction: share of bad samples or shards above which ``samples_of`` raises.

    Raises:
        ValueError: there is nothing to train on.

    Attributes:
        opener: opens the shards; those that fit in the window stay cached.
        holdout: the samples held out for validation.
        first_window: for each split the samples of the first shards; all of a small set.
        epoch_samples: number of training samples: exact if all shards were opened, otherwise
            extrapolated from the opened ones.
        stats: counts of ``samples_of``.
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
        self.source, self.window = source, window
        self.opener = ShardPrefetcher(source, keep=window, hashes=filters.deduplicate)
        self.stats = DataStats(limit=max_bad_fraction)
        train_shards, val_shards = self.shards("train"), self.shards("val")
        self.selector = SampleSelector(
            filters, shards=train_shards, buckets=buckets, max_upscale=max_upscale
        )
        passing = self._read_window(train_shards)
        samples = list(chain.from_iterable(passing.values()))
        group_keys = [[s.group_key for s in group] for group in self._by_group(passing)]
        self.holdout = Holdout(0 if val_shards else val_fraction, group_keys)
        held_out = [s for s in samples if s in self.holdout]
        of_val_shards = self._read_window(val_shards).values()
        self.first_window: dict[Split, list[Sample]] = {
            "train": [s for s in samples if s not in self.holdout],
            "val": list(chain.from_iterable(of_val_shards)) if val_shards else held_out,
        }
        num_train = len(self.first_window["train"])
        self.epoch_samples = round(num_train / len(passing) * len(train_shards))

    def broadcast_from_rank_zero(self) -> None:
        """Use rank 0's result: a rank that missed a shard would take another number of steps."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            shared: list[Any] = [(self.first_window["val"], self.epoch_samples)]
            torch.distributed.broadcast_object_list(shared, src=0)
            self.first_window["val"], self.epoch_samples = shared[0]

    def shards(self, split: Split) -> list[str]:
        """The shards of a split, alternating between groups so that each is covered early."""
        rounds = zip_longest(*(group.shards for group in self.source.groups(split)))
        return [shard for one_round in rounds for shard in one_round if shard is not None]

    def samples_of(self, opened: ShardIndex) -> list[Sample]:
        """The training samples of an opened shard, which are counted in ``stats``."""
        return list(self.selector.samples(opened, holdout=self.holdout, stats=self.stats))

    def _by_group(self, passing: dict[str, list[Sample]]) -> Iterator[list[Sample]]:
        """The passing training samples of each shard group that was opened.

        Raises:
            ValueError: no sample of a group passes.
        """
        groups = self.source.groups("train")
        for group in groups:
            opened = [shard for shard in group.shards if shard in passing]
            samples = [sample for shard in opened for sample in passing[shard]]
            if samples:
                yield samples
            elif len(opened) == len(group.shards) or not any(passing.values()):
                where = f" in {opened[0]}" if len(groups) > 1 else ""
                raise ValueError(self.selector.explain_empty(self._counts(opened), where))

    def _counts(self, shards: list[str]) -> DataStats:
        stats = DataStats(show=False)
        for shard in shards:
            index = self.opener.open(shard)
            list(self.selector.samples(index, holdout=Holdout(0), stats=stats))
        return stats

    def _read_window(self, shards: list[str]) -> dict[str, list[Sample]]:
        """Open shards up to a window; return the passing samples of each."""
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
            passed = map(self.selector.apply_filters, samples)
            passing[number] = [sample for sample in passed if isinstance(sample, Sample)]
        return {shards[number]: passing[number] for number in sorted(passing)}
