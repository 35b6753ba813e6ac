"""Reads all training shards of a source."""

from collections import Counter

from wuerstchen_pl.data.sources.source import Sample, SampleError, ShardIndex, Source


def open_all(source: Source) -> list[ShardIndex]:
    return [source.open(name) for group in source.groups("train") for name in group.shards]


def samples_and_errors(source: Source) -> tuple[list[Sample], list[SampleError]]:
    source.prepare()
    opened = open_all(source)
    return [s for o in opened for s in o.samples], [b for o in opened for b in o.bad]


def reasons(index: ShardIndex) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for bad in index.bad:
        counts[bad.reason] += bad.count
    return dict(counts)
