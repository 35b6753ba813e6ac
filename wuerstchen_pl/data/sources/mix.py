"""Mixes several sources in one run, sampled in proportion to weights."""

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
    """A ``Source`` over several others; its shards are named "<source>|<shard>".

    Args:
        sources: the sources by name.
        weights: relative sampling weight of each source, by name; the default is 1.

    Raises:
        ValueError: there is no source, a weight is not positive, or it names an unknown source.
    """

    def __init__(
        self, *, sources: Mapping[str, Source], weights: Mapping[str, float] | None = None
    ) -> None:
        weights = dict(weights or {})
        if not sources:
            raise ValueError("sources={} is empty; add at least one source")
        if unknown := sorted(weights.keys() - sources.keys()):
            raise ValueError(
                f"weights={weights} names {unknown[0]!r}, which is not one of the sources "
                f"({', '.join(sorted(sources))}); fix the name"
            )
        for name in sources:
            if weights.setdefault(name, 1.0) <= 0:
                raise ValueError(
                    f"weights.{name}={weights[name]} is out of range; use more than 0, or "
                    f"remove {name} from the sources"
                )
            if "|" in name:
                raise ValueError(
                    f"sources={sorted(sources)} names {name!r}, which contains '|'; remove it "
                    "from the name"
                )
        self.sources, self.weights = dict(sources), weights

    def prepare(self) -> None:
        """Prepare each source."""
        for source in self.sources.values():
            source.prepare()

    def groups(self, split: Split) -> list[ShardGroup]:
        """The shard groups of each source, with weights scaled by the source's."""
        return [
            ShardGroup(self.weights[name] * group.weight, [f"{name}|{s}" for s in group.shards])
            for name, source in self.sources.items()
            for group in source.groups(split)
        ]

    def open(self, shard: str) -> ShardIndex:
        """Index a shard of one of the sources."""
        name, _, inner_shard = shard.partition("|")
        opened = self.sources[name].open(inner_shard)
        samples = [
            dataclasses.replace(s, shard=shard, group_key=f"{name}|{s.group_key}")
            for s in opened.samples
        ]
        bad = [SampleError(b.reason, f"{name}: {b.where}", b.count) for b in opened.bad]
        return ShardIndex(samples, bad, opened.broken)

    def read(self, sample: Sample) -> bytes:
        """The encoded image of a sample."""
        name, _, inner_shard = sample.shard.partition("|")
        return self.sources[name].read(dataclasses.replace(sample, shard=inner_shard))
