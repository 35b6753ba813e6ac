"""Several sources in one run, drawn from in proportion to weights."""

import dataclasses
from collections.abc import Mapping

from wuerstchen_pl.data.sources.source import (
    Sample,
    SampleError,
    ShardGroup,
    ShardIndex,
    Source,
    Split,
)


class Mix:
    """A `Source` made of others; its shards are named after them.

    Args:
        sources: by name.
        weights: of each: how often it is drawn from, relative to the others; 1 if not given.

    Raises:
        ValueError: there is no source, or a weight is not positive or of no source.
    """

    def __init__(
        self, *, sources: Mapping[str, Source], weights: Mapping[str, float] | None = None
    ) -> None:
        weights = dict(weights or {})
        if not sources:
            raise ValueError("data.sources is empty: name at least one source.")
        if unknown := sorted(weights.keys() - sources.keys()):
            raise ValueError(
                f"data.weights names {unknown[0]!r}, which is not one of data.sources "
                f"({', '.join(sorted(sources))}): fix the name."
            )
        for name in sources:
            if weights.setdefault(name, 1.0) <= 0:
                raise ValueError(
                    f"data.weights.{name} is {weights[name]}: give more than 0, or remove it from "
                    "data.sources."
                )
            if "|" in name:
                raise ValueError(f"data.sources names {name!r}: leave out the '|'.")
        self.sources, self.weights = dict(sources), weights

    def prepare(self) -> None:
        """Make each source ready."""
        for source in self.sources.values():
            source.prepare()

    def groups(self, split: Split) -> list[ShardGroup]:
        """Name the shards of each source, with its weight."""
        return [
            ShardGroup(self.weights[name] * group.weight, [f"{name}|{s}" for s in group.shards])
            for name, source in self.sources.items()
            for group in source.groups(split)
        ]

    def open(self, shard: str) -> ShardIndex:
        """List what a shard of one of the sources holds."""
        name, _, own = shard.partition("|")
        opened = self.sources[name].open(own)
        samples = [
            dataclasses.replace(s, shard=shard, group_key=f"{name}|{s.group_key}")
            for s in opened.samples
        ]
        bad = [SampleError(b.reason, f"{name}: {b.where}", b.count) for b in opened.bad]
        return ShardIndex(samples, bad, opened.broken)

    def read(self, sample: Sample) -> bytes:
        """Return the encoded image of a sample."""
        name, _, own = sample.shard.partition("|")
        return self.sources[name].read(dataclasses.replace(sample, shard=own))
