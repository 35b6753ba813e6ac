"""Samples are selected by their size in the bucket, their image hash and the hold-out."""

from collections import Counter

from tests.data.factories import fake_sample
from wuerstchen_pl.data.ordering.buckets import Buckets
from wuerstchen_pl.data.ordering.filters import Filters
from wuerstchen_pl.data.ordering.prefetch import IMAGE_HASH
from wuerstchen_pl.data.ordering.selection import SampleSelector
from wuerstchen_pl.data.ordering.stats import DataStats
from wuerstchen_pl.data.sources.source import (
    Holdout,
    Sample,
    SampleError,
    ShardIndex,
)


def test_an_image_may_be_upscaled_up_to_the_limit() -> None:
    buckets = Buckets(policy="sizes", image_size=1, multiple=16, sizes=[[48, 48]])
    select = SampleSelector(Filters(), shards=["a"], buckets=buckets, max_upscale=1.5).select
    at, above = fake_sample("a", 0, 32, 32), fake_sample("a", 1, 31, 31)
    assert select(at) == at
    assert select(above) == "max_upscale"
    for unlimited in (
        SampleSelector(Filters(), shards=["a"], buckets=buckets),
        SampleSelector(Filters(), shards=["a"], max_upscale=1.5),
    ):
        assert unlimited.select(above) == above


def test_images_are_the_same_if_their_hashes_are() -> None:
    selector = SampleSelector(Filters(max_ratio=2), shards=["a", "b"])

    def with_hash(shard: str, number: int, image_hash: int | None, width: int = 40) -> Sample:
        metadata = {} if image_hash is None else {IMAGE_HASH: image_hash}
        return fake_sample(shard, number, width, metadata=metadata)

    wide = with_hash("a", 0, 7, width=200)
    assert selector.select(wide) == "max_ratio"  # and does not count as the first one
    first = with_hash("b", 0, 7)
    assert selector.apply_filters(first) == first
    assert selector.first_by_hash == {}  # ``apply_filters`` remembers nothing
    assert selector.select(first) == first
    for copy in (with_hash("a", 0, 7), with_hash("b", 1, 7)):
        assert selector.select(copy) == "duplicate"
        assert selector.apply_filters(copy) == copy
    for other in (first, with_hash("a", 1, 8), with_hash("a", 2, None), with_hash("a", 3, None)):
        assert selector.select(other) == other


def test_counts_are_of_samples_that_are_not_held_out() -> None:
    selector = SampleSelector(Filters(min_size=30), shards=["a"])
    samples = [fake_sample("a", i, 40 if i % 3 else 20) for i in range(60)]
    holdout, stats = Holdout(0.3), DataStats(show=False)
    opened = ShardIndex(samples, [SampleError("no image", "a", 2)], broken=True)
    kept = list(selector.samples(opened, holdout=holdout, stats=stats))
    used = [s for s in samples if s not in holdout]
    assert kept == [s for s in used if s.width == 40]
    assert stats.counts == Counter(
        {
            "shards": 1, "shards/broken": 1, "bad/no image": 2, "seen": len(used),
            "dropped/min_size": len(used) - len(kept),
        }
    )  # fmt: skip
