"""The order of batches: ranks, resumption, pending samples, mixtures and ``sequential_batches``."""

from collections import Counter
from itertools import islice
from typing import Any

import pytest

from tests.data.factories import FakeSource, fake_sample
from tests.data.ordering.streams import SHARDS, CopySource, names, stream
from wuerstchen_pl.data.ordering.batches import Batches, BatchSpec, sequential_batches
from wuerstchen_pl.data.ordering.buckets import Buckets
from wuerstchen_pl.data.ordering.filters import Filters
from wuerstchen_pl.data.ordering.stats import DataStats
from wuerstchen_pl.data.ordering.stream import Mixture
from wuerstchen_pl.data.sources.source import SampleError, ShardIndex


def batches(source: FakeSource | None = None, **changes: Any) -> Batches:
    settings = {"rank": 0, "world_size": 1, "batch_size": 4, "max_upscale": None, "policy": "area"}
    settings |= {key: changes.pop(key) for key in list(changes) if key in settings}
    buckets = Buckets(policy=settings.pop("policy"), image_size=32, multiple=16)
    mixture = Mixture([stream(source or FakeSource.with_sizes(SHARDS), **changes)], [1.0], seed=0)
    return Batches(mixture, buckets, **settings)


def epochs(specs: list[BatchSpec]) -> dict[int, list[str]]:
    """Names of the samples by epoch."""
    by_epoch: dict[int, list[str]] = {}
    for spec in specs:
        for sample, epoch in spec.rows:
            by_epoch.setdefault(epoch, []).append(sample.name)
    return by_epoch


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
