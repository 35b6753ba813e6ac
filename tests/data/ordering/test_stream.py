"""The order of samples: epochs, windows, positions and held-out samples."""

from collections import Counter
from itertools import islice, pairwise

import pytest

from tests.data.factories import FakeSource, fake_sample
from tests.data.ordering.streams import SHARDS, CopySource, names, stream
from wuerstchen_pl.data.ordering.filters import Filters
from wuerstchen_pl.data.ordering.stream import Position
from wuerstchen_pl.data.sources.source import Holdout, SampleError, ShardIndex


def test_each_epoch_has_every_sample_once_in_another_order() -> None:
    source = FakeSource.with_sizes(SHARDS)
    everything = sorted(s.name for o in source.indexes.values() for s in o.samples)
    drawn = list(islice(stream(source), 3 * 85))
    passes = [names([d for d in drawn if d.epoch == epoch]) for epoch in range(3)]
    assert all(sorted(one) == everything for one in passes)
    assert passes[0] != passes[1] != passes[2]
    assert passes[0] == names(list(islice(stream(FakeSource.with_sizes(SHARDS)), 85)))
    assert passes[0] != names(list(islice(stream(FakeSource.with_sizes(SHARDS), seed=1), 85)))


def test_a_set_that_fits_in_a_window_is_fully_shuffled_and_opened_once() -> None:
    source = FakeSource.with_sizes(SHARDS)
    drawn = list(islice(stream(source, shuffle_samples=1000), 3 * 85))
    assert Counter(source.opened) == dict.fromkeys(SHARDS, 1)
    # In a perfect shuffle few neighbors share a shard: the sum of squared shares is 0.26.
    same = sum(a.sample.shard == b.sample.shard for a, b in pairwise(drawn))
    assert same / len(drawn) < 0.35


def test_memory_is_bounded_by_two_windows() -> None:
    source = FakeSource.with_sizes({f"{i:03d}": 10 for i in range(100)})
    one = stream(source, shuffle_samples=30)
    list(islice(one, 5))
    assert len(set(source.opened)) <= 2 * 3


def test_a_strict_filter_makes_windows_smaller_not_longer() -> None:
    # Two samples of each 12 are 64 wide.
    source = FakeSource.with_sizes({f"{i:03d}": 12 for i in range(100)})
    one = stream(source, shuffle_samples=36, filters=Filters(max_ratio=2, min_words=1, max_size=64))
    strict = stream(source, shuffle_samples=36, filters=Filters(min_size=40, max_ratio=1))
    for order, each in ((one, 36), (strict, 6)):
        next(order)
        assert order.stats.counts["seen"] == 36
        assert len(order._window) == each
        order.opener.close()


@pytest.mark.parametrize("start", range(0, 200, 7))
def test_seeking_to_any_position_opens_one_window(start: int) -> None:
    whole = stream(FakeSource.with_sizes(SHARDS))
    list(islice(whole, start))
    source = FakeSource.with_sizes(SHARDS)
    other = stream(source)
    other.seek(whole.position)
    assert len(set(source.opened)) <= 5
    assert names(list(islice(other, 90))) == names(list(islice(whole, 90)))


def test_seeking_far_opens_no_more_than_seeking_near() -> None:
    def opened_at(samples: int) -> int:
        one = stream(
            FakeSource.with_sizes({f"{i:04d}": 10 for i in range(2000)}), shuffle_samples=50
        )
        list(islice(one, samples))
        source = FakeSource.with_sizes({f"{i:04d}": 10 for i in range(2000)})
        other = stream(source, shuffle_samples=50)
        other.seek(one.position)
        other.opener.close()
        return len(source.opened)

    # A window has 5 shards, and at most 5 more are opened in the background.
    assert max(opened_at(12), opened_at(1_012), opened_at(19_012)) <= 10


def test_at_the_end_of_a_window_the_next_is_opened_lazily() -> None:
    one = stream(FakeSource.with_sizes(SHARDS), shuffle_samples=30)
    next(one)
    list(islice(one, len(one._window) - 1))
    source = FakeSource.with_sizes(SHARDS)
    other = stream(source, shuffle_samples=30)
    other.seek(one.position)
    assert source.opened == []
    assert names(list(islice(other, 100))) == names(list(islice(one, 100)))


def test_substitutes_are_the_next_samples_of_the_window_without_the_last_one() -> None:
    one = stream(FakeSource.with_sizes({"a": 10}), shuffle_samples=100)
    window = names(list(islice(stream(FakeSource.with_sizes({"a": 10}), shuffle_samples=100), 10)))
    for drawn in range(1, 11):
        last = next(one)
        rotated = window[drawn:] + window[: drawn - 1]
        assert last.sample.name == window[drawn - 1]
        assert names(one.other_samples(100)) == rotated
        assert names(one.other_samples(4)) == rotated[:4]
        assert {other.epoch for other in one.other_samples(4)} == {last.epoch}
    single = stream(FakeSource.with_sizes({"a": 1}))
    next(single)
    assert single.other_samples(3) == []


def test_a_position_counts_the_samples_of_its_window() -> None:
    one = stream(FakeSource.with_sizes({"a": 4, "b": 4}), shuffle_samples=4)
    assert one.position == Position(epoch=0, shard=0, offset=0)
    positions = []
    for _ in range(10):
        next(one)
        positions.append(tuple(one.position))
    first = [(0, 0, 1), (0, 0, 2), (0, 0, 3), (0, 1, 0)]
    second = [(0, 1, 1), (0, 1, 2), (0, 1, 3), (0, 2, 0)]
    assert positions == [*first, *second, (1, 0, 1), (1, 0, 2)]


def test_a_window_is_no_larger_than_necessary() -> None:
    for shuffle_samples, opened in ((1, 1), (10, 1), (11, 2), (20, 2), (21, 3), (99, 3)):
        one = stream(
            FakeSource.with_sizes(dict.fromkeys("abc", 10)), shuffle_samples=shuffle_samples
        )
        next(one)
        assert one.stats.counts["shards"] == opened


def test_an_epoch_that_yields_nothing_is_an_error_even_after_another_one() -> None:
    source = FakeSource.with_sizes({"a": 3})
    one = stream(source, shuffle_samples=1)
    one.opener.keep = one.opener._cache_room = 0
    list(islice(one, 3))
    source.indexes["a"] = ShardIndex([])
    with pytest.raises(ValueError, match="nothing to train on"):
        next(one)


def test_held_out_samples_are_never_drawn() -> None:
    source = FakeSource.with_sizes({"a": 300})
    holdout = Holdout(0.3)
    kept = {s.name for s in source.indexes["a"].samples if s in holdout}
    assert 60 < len(kept) < 120
    assert not kept & set(names(list(islice(stream(source, holdout=holdout), 600))))


def test_duplicates_are_dropped_in_every_epoch() -> None:
    source = CopySource(FakeSource.with_sizes(SHARDS).indexes)
    one = stream(source, filters=Filters(deduplicate=True))
    copies = [s.name for o in source.indexes.values() for s in o.samples if int(s.key) % 3 == 0]
    drawn = list(islice(one, 4 * (85 - len(copies) + 1)))
    kept = Counter(name for name in names(drawn) if name in copies)
    assert list(kept.values()) == [4]
    assert one.stats.counts["dropped/duplicate"] >= 3 * (len(copies) - 1)


def test_nothing_to_train_on_is_an_error_with_the_reason() -> None:
    source = FakeSource(
        {"a": ShardIndex([fake_sample("a", 0)], [SampleError("no caption", "a/0001", 7)])}
    )
    with pytest.raises(ValueError, match=r"nothing to train on \(1 sample .*min_size.*7 no cap"):
        next(stream(source, filters=Filters(min_size=500)))
    with pytest.raises(ValueError, match="nothing to train on"):
        next(stream(FakeSource({})))


def test_a_seek_to_the_start_does_not_delay_that_error() -> None:
    source = FakeSource.with_sizes({"a": 9})
    one = stream(source, filters=Filters(min_size=500))
    one.seek(one.position)
    with pytest.raises(ValueError, match=r"nothing to train on \(9 samples read from 1 shard"):
        next(one)


def test_only_broken_shards_stop_the_run_early() -> None:
    broken = ShardIndex([], [SampleError("unreachable shard", "refused")], broken=True)
    source = FakeSource({f"{i:03d}": broken for i in range(500)})
    with pytest.raises(ValueError, match=r"none of the first 8 shards .*unreachable"):
        next(stream(source))
    assert len(source.opened) < 30
