"""Builds streams over in-memory samples."""

from typing import Any

from tests.data.factories import FakeSource
from wuerstchen_pl.data.ordering.filters import Filters
from wuerstchen_pl.data.ordering.prefetch import ShardPrefetcher
from wuerstchen_pl.data.ordering.stats import DataStats
from wuerstchen_pl.data.ordering.stream import EpochSample, Stream
from wuerstchen_pl.data.sources.source import Holdout, Sample


class CopySource(FakeSource):
    """Every third image has the same bytes."""

    def read(self, sample: Sample) -> bytes:
        return b"copy" if int(sample.key) % 3 == 0 else sample.name.encode()


SHARDS = {"a": 23, "b": 5, "c": 17, "d": 9, "e": 31}


def stream(source: FakeSource, *, shards: list[str] | None = None, **changes: Any) -> Stream:
    settings = {"seed": 0, "shuffle_samples": 30, "filters": Filters(), "holdout": Holdout(0)}
    settings |= changes
    opener = ShardPrefetcher(
        source, keep=settings["shuffle_samples"], hashes=settings["filters"].deduplicate
    )
    names = list(source.indexes) if shards is None else shards
    return Stream(opener=opener, shards=names, stats=DataStats(show=False), **settings)


def names(drawn: list[EpochSample] | tuple[EpochSample, ...]) -> list[str]:
    return [d.sample.name for d in drawn]
