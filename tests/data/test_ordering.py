"""The order of samples and batches: `Stream`, `Batches` and `sequential_batches`."""

from collections import Counter
from itertools import islice, pairwise
from typing import Any

import pytest

from tests.data.factories import FakeSource, fake_sample
from wuerstchen_pl.data.ordering.batches import Batches, BatchSpec, sequential_batches
from wuerstchen_pl.data.ordering.buckets import Buckets
from wuerstchen_pl.data.ordering.filters import Filters
from wuerstchen_pl.data.ordering.prefetch import ShardPrefetcher
from wuerstchen_pl.data.ordering.stats import DataStats
from wuerstchen_pl.data.ordering.stream import EpochSample, Mixture, Position, Stream
from wuerstchen_pl.data.sources.source import Holdout, Sample, SampleError, ShardIndex


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


def batches(source: FakeSource | None = None, **changes: Any) -> Batches:
    settings = {"rank": 0, "world_size": 1, "batch_size": 4, "max_upscale": None, "policy": "area"}
    settings |= {key: changes.pop(key) for key in list(changes) if key in settings}
    buckets = Buckets(policy=settings.pop("policy"), image_size=32, multiple=16)
    mixture = Mixture([stream(source or FakeSource.with_sizes(SHARDS), **changes)], [1.0], seed=0)
    return Batches(mixture, buckets, **settings)


def names(drawn: list[EpochSample] | tuple[EpochSample, ...]) -> list[str]:
    return [d.sample.name for d in drawn]


def epochs(specs: list[BatchSpec]) -> dict[int, list[str]]:
    """Names of the samples by epoch."""
    by_epoch: dict[int, list[str]] = {}
    for spec in specs:
        for sample, epoch in spec.rows:
            by_epoch.setdefault(epoch, []).append(sample.name)
    return by_epoch


# Samples


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


def test_a_small_set_holds_out_at_least_one_group() -> None:
    group_keys = [f"group_key {i}" for i in range(5)]
    assert (
        sum(fake_sample("s", 0, group_key=k) in Holdout(0.001, group_keys) for k in group_keys) == 1
    )
    assert (
        sum(fake_sample("s", 0, group_key=k) in Holdout(0.0, group_keys) for k in group_keys) == 0
    )


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
    with pytest.raises(ValueError, match=r"nothing to train on \(1 samples.*min_size.*7 no cap"):
        next(stream(source, filters=Filters(min_size=500)))
    with pytest.raises(ValueError, match="nothing to train on"):
        next(stream(FakeSource({})))


def test_a_seek_to_the_start_does_not_delay_that_error() -> None:
    source = FakeSource.with_sizes({"a": 9})
    one = stream(source, filters=Filters(min_size=500))
    one.seek(one.position)
    with pytest.raises(ValueError, match=r"nothing to train on \(9 samples read from 1 shards"):
        next(one)


def test_only_broken_shards_stop_the_run_early() -> None:
    broken = ShardIndex([], [SampleError("unreachable shard", "refused")], broken=True)
    source = FakeSource({f"{i:03d}": broken for i in range(500)})
    with pytest.raises(ValueError, match=r"none of the first 8 shards .*unreachable"):
        next(stream(source))
    assert len(source.opened) < 30


# Batches


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("policy", ["area", "paper"])
def test_ranks_share_each_batch_without_losing_or_repeating_samples(
    world_size: int, policy: str
) -> None:
    ranks = [batches(rank=r, world_size=world_size, policy=policy) for r in range(world_size)]
    global_batches = []
    for parts in islice(zip(*ranks, strict=True), 240 // world_size):
        assert len({part.size for part in parts}) == 1
        assert all(len(part.rows) == 4 for part in parts)
        rows = tuple(row for part in parts for row in part.rows)
        global_batches.append(BatchSpec(parts[0].size, rows))
    by_epoch = epochs(global_batches)
    everything = {s.name for o in FakeSource.with_sizes(SHARDS).indexes.values() for s in o.samples}
    assert len(by_epoch) > 8
    for epoch, seen in by_epoch.items():
        assert len(seen) == len(set(seen)), f"epoch {epoch} repeats a sample"
        if epoch < max(by_epoch) - 5:  # all buckets have been emptied since
            assert set(seen) == everything


def test_a_batch_has_substitutes_that_are_not_its_last_row() -> None:
    order = batches(FakeSource.with_sizes({"a": 40}), shuffle_samples=100)
    for spec in islice(order, 30):
        substitutes = names(spec.fallback)
        assert len(substitutes) == len(set(substitutes)) == 16
        assert spec.rows[-1].sample.name not in substitutes
        assert spec.is_unique


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 is out of range"),
        ({"rank": 2, "world_size": 2}, "rank=2 of 2 processes"),
        ({"rank": -1}, "rank=-1 of 1 processes"),
    ],
)
def test_batches_out_of_range_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches(**settings)
    assert len(next(batches(batch_size=1, rank=1, world_size=2)).rows) == 1


def test_images_are_dropped_only_if_upscaled_above_the_limit() -> None:
    samples = [fake_sample("a", i, 16 + 8 * (i % 3), 16 + 8 * (i % 3)) for i in range(30)]
    source = FakeSource({"a": ShardIndex(samples)})
    for limit, smallest in ((2.0, 16), (1.99, 24), (4 / 3, 24), (1.33, 32), (None, 16)):
        order = batches(source, max_upscale=limit)
        assert min(r.sample.width for b in islice(order, 20) for r in b.rows) == smallest


def test_every_sample_is_in_the_bucket_of_its_ratio_and_buckets_are_mixed() -> None:
    order = batches()
    specs = list(islice(order, 60))
    for spec in specs:
        for row in spec.rows:
            assert order.buckets.assign(row.sample, 0) == spec.size
    assert len({spec.size for spec in specs[:8]}) > 2


@pytest.mark.parametrize("policy", ["area", "paper"])
@pytest.mark.parametrize("stop", range(0, 70, 3))
def test_batches_resume_from_plain_values(stop: int, policy: str) -> None:
    whole = batches(filters=Filters(min_size=33), policy=policy)
    list(islice(whole, stop))
    state = whole.state_dict(whole.snapshot())
    other = batches(filters=Filters(min_size=33), policy=policy)
    other.restore(other.load_state_dict(state))
    assert list(islice(other, 30)) == list(islice(whole, 30))
    assert other.stats.counts == whole.stats.counts


def test_reading_ahead_can_be_undone() -> None:
    order = batches(
        CopySource(FakeSource.with_sizes(SHARDS).indexes), filters=Filters(deduplicate=True)
    )
    list(islice(order, 3))
    before, seen_hashes = order.snapshot(), dict(order.stream.streams[0].selector.first_by_hash)
    first = list(islice(order, 50))
    counts = order.stats.counts.copy()
    assert counts["dropped/duplicate"] > 50
    order.restore(before)
    assert order.stream.streams[0].selector.first_by_hash == seen_hashes
    assert list(islice(order, 50)) == first
    assert order.stats.counts == counts


def test_another_number_of_processes_resumes_with_the_same_samples() -> None:
    two = [batches(rank=rank, world_size=2) for rank in range(2)]
    before = [part for parts in islice(zip(*two, strict=True), 31) for part in parts]
    state = two[0].state_dict(two[0].snapshot())
    one = batches()
    with pytest.warns(UserWarning, match="global batch of 8 samples.*now it is 4"):
        one.restore(one.load_state_dict(state))
    by_epoch = epochs(before + list(islice(one, 100)))
    everything = {s.name for o in FakeSource.with_sizes(SHARDS).indexes.values() for s in o.samples}
    for epoch in range(max(by_epoch) - 5):
        assert sorted(by_epoch[epoch]) == sorted(everything), f"epoch {epoch} is wrong"


def test_each_batch_has_the_paper_size_of_its_number() -> None:
    """With another number of processes, batches are counted as if it had always been so."""

    def sizes(order: Batches, count: int) -> list[tuple[int, int]]:
        return [spec.size for spec in islice(order, count)]

    def expected(order: Batches, first: int, count: int) -> list[tuple[int, int]]:
        return [order.buckets.assign(fake_sample("a", 0), first + i) for i in range(count)]

    two = batches(policy="paper", world_size=2)
    assert sizes(two, 15) == expected(two, 0, 15)
    one = batches(policy="paper")
    with pytest.warns(UserWarning, match="global batch of 8 samples.*now it is 4"):
        one.restore(one.load_state_dict(two.state_dict(two.snapshot())))
    assert sizes(one, 20) == expected(one, 30, 20)


def test_other_shards_restart_the_epoch_with_a_warning() -> None:
    order = batches()
    list(islice(order, 40))
    state = order.state_dict(order.snapshot())
    epoch = order.snapshot().positions[0].epoch
    other = batches(FakeSource.with_sizes({**SHARDS, "new": 8}))
    with pytest.warns(UserWarning, match="shards differ"):
        snapshot = other.load_state_dict(state)
    other.restore(snapshot)
    by_epoch = epochs(list(islice(other, 60)))
    assert min(by_epoch) == epoch > 0
    everything = {
        s.name for o in other.stream.streams[0].opener.source.indexes.values() for s in o.samples
    }
    assert Counter(by_epoch[epoch]) == Counter(everything)  # the whole epoch, and nothing twice


def test_a_run_resumes_with_fewer_samples() -> None:
    order = batches(FakeSource.with_sizes({"a": 60}), shuffle_samples=100)
    list(islice(order, 12))
    state = order.state_dict(order.snapshot())
    other = batches(FakeSource.with_sizes({"a": 20}), shuffle_samples=100)
    with pytest.warns(UserWarning, match="there are fewer samples"):
        other.restore(other.load_state_dict(state))
    drawn = [row for spec in islice(other, 25) for row in spec.rows]
    assert Counter(row.sample.name for row in drawn if row.epoch == 2) == Counter(
        s.name for s in FakeSource.with_sizes({"a": 20}).indexes["a"].samples
    )


def test_a_run_resumes_with_moved_shards() -> None:
    def moved(folder: str) -> Batches:
        sizes = {f"{folder}/{name}/00000.tar": n for name, n in SHARDS.items()}
        copies = CopySource(FakeSource.with_sizes(sizes).indexes)
        return batches(copies, filters=Filters(deduplicate=True))

    def rows(order: Batches) -> list[Any]:
        return [
            (d.epoch, d.sample.shard.partition("/")[2], d.sample.key)
            for spec in islice(order, 30)
            for d in spec.rows
        ]

    order = moved("here")
    list(islice(order, 17))
    state = order.state_dict(order.snapshot())
    assert sum(len(of) for _, of in state["pending"]) > 1
    other = moved("there")
    other.restore(other.load_state_dict(state))
    assert rows(other) == rows(order)


def test_a_checkpoint_contains_no_shard_names() -> None:
    order = batches(FakeSource.with_sizes({f"secret {name}": n for name, n in SHARDS.items()}))
    list(islice(order, 7))
    pending = order.state_dict(order.snapshot())["pending"]
    shard_numbers = [row[:2] for _, rows in pending for row in rows]
    assert len(shard_numbers) > 1
    assert all(stream == 0 and 0 <= number < len(SHARDS) for stream, number in shard_numbers)
    fields = [row[2:6] for _, rows in pending for row in rows]
    assert "secret" not in str(fields)


def test_pending_samples_move_to_the_current_sizes() -> None:
    order = batches()
    list(islice(order, 9))
    state = order.state_dict(order.snapshot())
    waiting = sum(len(of) for _, of in state["pending"])
    assert waiting > 1
    other = batches()
    other.buckets = Buckets(policy="sizes", image_size=32, multiple=16, sizes=[[64, 64]])
    snapshot = other.load_state_dict(state)
    assert snapshot.pending.keys() == {(64, 64)}
    assert len(snapshot.pending[64, 64]) == waiting


def test_duplicates_in_shards_of_equal_names_are_dropped() -> None:
    sizes = {"a/0.tar": 10, "b/0.tar": 10}
    source = CopySource(FakeSource.with_sizes(sizes).indexes)
    one = stream(source, filters=Filters(deduplicate=True), shuffle_samples=100)
    drawn = list(islice(one, 13))
    assert {d.epoch for d in drawn} == {0}  # 12 images, and one of the copies
    assert next(one).epoch == 1


def test_bad_samples_of_a_shard_are_checked_after_its_good_ones() -> None:
    bad = [SampleError("no caption", f"{i}") for i in range(1200)]
    opened = ShardIndex([fake_sample("a", i) for i in range(4000)], bad)
    one = stream(FakeSource({"a": opened}))
    one.stats.limit = 0.25
    next(one)
    one = stream(FakeSource({"a": opened}))
    one.stats.limit = 0.2
    with pytest.raises(ValueError, match=r"1200 of 5200 samples are bad"):
        next(one)


def test_too_small_images_are_dropped_counted_and_never_loop_forever() -> None:
    source = FakeSource({"a": ShardIndex([fake_sample("a", i, 10 + i, 10 + i) for i in range(40)])})
    order = batches(source, max_upscale=1.0)
    widths = {row.sample.width for spec in islice(order, 30) for row in spec.rows}
    assert min(widths) == 32
    # 120 draws of 18 large enough images are between 6 and 7 epochs; 22 are too small.
    assert 6 * 22 <= order.stats.counts["dropped/max_upscale"] <= 7 * 22
    with pytest.raises(ValueError, match=r"data\.max_upscale=0\.5 drops every image"):
        next(batches(source, max_upscale=0.5))


def mixed(**sizes: int) -> Batches:
    """Batches of a mixture, 3 : 1, of shards of these sizes."""
    streams = [
        stream(FakeSource.with_sizes({name: size}), shards=[name], shuffle_samples=100)
        for name, size in sizes.items()
    ]
    stats = DataStats()
    for one in streams:
        one.stats = stats
    buckets = Buckets(policy="area", image_size=32, multiple=16)
    return Batches(Mixture(streams, [3.0, 1.0], seed=0), buckets, batch_size=4)


def test_a_mixture_keeps_its_weights_and_resumes() -> None:
    order = mixed(a=50, b=50)
    rows = [row.sample.shard for spec in islice(order, 500) for row in spec.rows]
    # 2,000 draws: the standard deviation of the share is 0.01.
    assert abs(rows.count("a") / len(rows) - 0.75) < 0.04
    state = order.snapshot()
    assert state.drawn == len(rows) + sum(map(len, state.pending.values()))
    other = mixed(a=50, b=50)
    other.restore(other.load_state_dict(order.state_dict(order.snapshot())))
    assert list(islice(other, 20)) == list(islice(order, 20))


def test_each_stream_restarts_at_the_latest_epoch_if_shards_differ() -> None:
    order = mixed(a=50, b=50)
    list(islice(order, 100))
    reached = [position.epoch for position in order.snapshot().positions]
    assert reached[0] > reached[1]
    other = mixed(a=50, c=50)
    with pytest.warns(UserWarning, match="shards differ"):
        other.restore(other.load_state_dict(order.state_dict(order.snapshot())))
    first: dict[str, int] = {}
    for spec in islice(other, 50):
        for row in spec.rows:
            first.setdefault(row.sample.shard, row.epoch)
    assert first == {"a": reached[0], "c": reached[0]}


def test_sequential_batches_cover_each_sample_once() -> None:
    samples = [s for o in FakeSource.with_sizes(SHARDS).indexes.values() for s in o.samples]
    buckets = Buckets(policy="area", image_size=32, multiple=16)
    alone = sequential_batches(samples, buckets, batch_size=4, rank=0, world_size=1)
    assert sorted(n for r in alone for n in names(r.rows)) == sorted(s.name for s in samples)
    ranks = [
        sequential_batches(samples, buckets, batch_size=4, rank=r, world_size=3) for r in range(3)
    ]
    assert len({len(specs) for specs in ranks}) == 1
    unique = [n for rank in ranks for r in rank if r.is_unique for n in names(r.rows)]
    assert sorted(unique) == sorted(s.name for s in samples)
    repeats = [(step, r) for rank in ranks for step, r in enumerate(rank) if not r.is_unique]
    assert repeats
    assert all(r.rows == ranks[0][step].rows[:1] for step, r in repeats)
    assert all(r.is_unique and len(r.rows) <= 4 for r in alone)
    assert {row.epoch for r in alone for row in (*r.rows, *r.fallback)} == {-1}
    assert all(names(r.fallback) == [s.name for s in samples[:16]] for r in alone)
    # the fullest bucket first; within one, the order of the samples
    counts = Counter(buckets.assign(s, 0) for s in samples)
    steps = [r.size for r in alone]
    order = sorted(counts, key=lambda size: (-counts[size], size))
    assert steps == [size for size in order for _ in range(0, counts[size], 4)]
    for size in order:
        rows = [n for r in alone if r.size == size for n in names(r.rows)]
        assert rows == [s.name for s in samples if buckets.assign(s, 0) == size]


def test_sequential_batches_draw_a_paper_size_per_global_batch() -> None:
    samples = [fake_sample("a", i) for i in range(60)]
    buckets = Buckets(policy="paper", image_size=32, multiple=16)
    ranks = [
        sequential_batches(samples, buckets, batch_size=3, rank=r, world_size=2) for r in range(2)
    ]
    assert all(len(r.rows) == 3 for rank in ranks for r in rank)
    for step in range(10):
        rows = [int(row.sample.key) for rank in ranks for row in rank[step].rows]
        number = min(rows) // 6
        assert sorted(rows) == list(range(6 * number, 6 * number + 6))
        assert {rank[step].size for rank in ranks} == {buckets.assign(samples[0], number)}
    assert {n for rank in ranks for r in rank for n in names(r.rows)} == {s.name for s in samples}
