"""The splits of a source: which shards are opened, what is held out, and how much is expected."""

from typing import Any

import pytest
import torch

from tests.data.factories import FakeSource, fake_sample
from wuerstchen_pl.data.ordering.buckets import Buckets
from wuerstchen_pl.data.ordering.filters import Filters
from wuerstchen_pl.data.ordering.splits import Splits
from wuerstchen_pl.data.sources.source import (
    Holdout,
    Sample,
    SampleError,
    ShardGroup,
    ShardIndex,
    Split,
)


class GroupedSource(FakeSource):
    """A source whose shards are grouped by their first letter; those with a "v" are validation."""

    def groups(self, split: Split) -> list[ShardGroup]:
        letters = sorted({name[0] for name in self.indexes if ("v" in name) == (split == "val")})
        return [ShardGroup(1.0, [n for n in self.indexes if n[0] == letter]) for letter in letters]


def splits(source: FakeSource, **changes: Any) -> Splits:
    settings: dict[str, Any] = {
        "filters": Filters(), "max_upscale": None, "val_fraction": 0.0, "window": 1000,
        "buckets": Buckets(policy="area", image_size=32, multiple=16),
    }  # fmt: skip
    result = Splits(source, **settings | changes)
    result.opener.close()
    return result


def everything(source: FakeSource) -> list[Sample]:
    return [s for index in source.indexes.values() for s in index.samples]


def test_shards_alternate_between_groups() -> None:
    source = GroupedSource.with_sizes(dict.fromkeys(["a0", "a1", "a2", "b0", "c0", "c1", "v0"], 2))
    result = splits(source)
    assert result.shards("train") == ["a0", "b0", "c0", "a1", "c1", "a2"]
    assert result.shards("val") == ["v0"]


def test_a_small_set_is_split_completely_and_in_its_order() -> None:
    source = FakeSource.with_sizes({f"{i:02d}": 5 for i in range(20)})
    result = splits(source, val_fraction=0.2)
    train, val = result.first_window["train"], result.first_window["val"]
    assert train == [s for s in everything(source) if s not in Holdout(0.2)]
    assert val == [s for s in everything(source) if s in Holdout(0.2)]
    assert result.epoch_samples == len(train)
    assert 5 < len(val) < 40
    assert [
        s for name in result.shards("train") for s in result.samples_of(source.open(name))
    ] == train
    assert result.stats.counts == {"shards": 20, "shards/broken": 0, "seen": len(train)}


def test_a_window_opens_no_more_shards_than_it_needs_and_extrapolates() -> None:
    source = FakeSource.with_sizes({f"{i:02d}": 7 for i in range(30)})
    result = splits(source, window=21, val_fraction=0.3)
    listed = sorted(result.first_window["train"] + result.first_window["val"], key=lambda s: s.name)
    opened = sorted({s.shard for s in listed})
    assert len(opened) == 3  # 21 samples
    assert listed == [s for name in opened for s in source.indexes[name].samples]
    assert opened != ["00", "01", "02"]
    train = result.first_window["train"]
    assert train == sorted(train, key=lambda s: s.name)
    assert 0 < len(train) < 21
    assert result.epoch_samples == len(train) * 30 / 3
    assert len(splits(source, window=22).first_window["train"]) == 28


def test_the_expected_samples_are_rounded() -> None:
    source = FakeSource.with_sizes({f"{i:02d}": 7 for i in range(31)})
    fractions = set()
    for opened in (3, 6, 7, 9, 11):
        result = splits(source, window=7 * opened, val_fraction=0.3)
        exact = len(result.first_window["train"]) * 31 / opened
        assert abs(result.epoch_samples - exact) <= 0.5
        fractions.add(exact % 1 > 0.5)
    assert True in fractions


def test_samples_that_the_filters_drop_are_in_no_split_and_not_expected() -> None:
    source = GroupedSource.with_sizes({"a": 60, "v": 12})
    choices: dict[str, Any] = {"filters": Filters(max_ratio=1.2), "max_upscale": 0.9}
    result = splits(source, **choices, val_fraction=0.5)
    square = [s for s in everything(source) if s.width == s.height >= 32 / 0.9]
    assert 0 < len(square) < 72
    # Validation shards are used completely, and then nothing is held out.
    assert result.first_window["train"] == [s for s in square if s.shard == "a"]
    assert result.first_window["val"] == [s for s in square if s.shard == "v"]
    assert result.holdout.threshold == 0
    assert result.epoch_samples == len(result.first_window["train"])


def test_every_setting_that_drops_samples_is_named_if_nothing_passes() -> None:
    sizes = [(20, 20)] * 2 + [(64, 20)] * 3
    source = FakeSource({"a": ShardIndex([fake_sample("a", i, *s) for i, s in enumerate(sizes)])})
    choices: dict[str, Any] = {"filters": Filters(max_ratio=2), "max_upscale": 1.0}
    settings = r"; relax data\.filters\.max_ratio=2 and data\.max_upscale=1\.0 \(or lower"
    for window in (5, 6):  # filled by the samples, and larger
        with pytest.raises(ValueError, match=rf"3 max_ratio, 2 max_upscale\){settings}"):
            splits(source, window=window, **choices)


def test_a_group_of_a_mixture_that_is_empty_is_named() -> None:
    source = GroupedSource.with_sizes({"a": 9, "b": 9})
    source.indexes["b"] = ShardIndex([], [SampleError("no caption", "b/0", 7)])
    with pytest.raises(ValueError, match=r"train on in b \(0 samples .* bad: 7 no caption\); repa"):
        splits(source)


def test_too_many_bad_samples_are_an_error_when_they_are_used() -> None:
    bad = [SampleError("no image", "a/9", 500)]
    opened = ShardIndex([fake_sample("a", i) for i in range(500)], bad)
    with pytest.warns(UserWarning, match="no image"):
        assert len(splits(FakeSource({"a": opened})).samples_of(opened)) == 500
    strict = splits(FakeSource({"a": opened}), max_bad_fraction=0.49)
    with (
        pytest.warns(UserWarning, match="no image"),
        pytest.raises(ValueError, match="500 of 1000 samples are bad"),
    ):
        strict.samples_of(opened)


def test_duplicates_are_found_on_request_only() -> None:
    class Copies(FakeSource):
        def read(self, sample: Sample) -> bytes:
            return b"copy"

    source = Copies.with_sizes({"a": 4, "b": 3})
    result = splits(source, filters=Filters(deduplicate=True))
    indexes = [result.opener.open(name) for name in "ab"]
    kept = [s for index in indexes for s in result.samples_of(index)]
    assert [s.name for s in kept] == ["a/0000"]
    assert result.stats.counts["dropped/duplicate"] == 6
    # The first copy is kept again in the next epoch, in any order.
    again = [s for index in reversed(indexes) for s in result.samples_of(index)]
    assert again == kept
    plain = splits(Copies.with_sizes({"a": 4}))
    assert len(plain.samples_of(plain.opener.open("a"))) == 4


def test_every_process_uses_the_splits_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a process that missed shards, too: it would take another number of steps."""
    first = splits(FakeSource.with_sizes({"a": 40, "b": 40}), val_fraction=0.2)

    def broadcast(shared: list[Any], src: int) -> None:
        assert src == 0
        assert shared == [(second.first_window["val"], second.epoch_samples)]
        shared[:] = [(first.first_window["val"], first.epoch_samples)]

    second = splits(FakeSource.with_sizes({"a": 40}), val_fraction=0.2)
    second_train = second.first_window["train"]
    assert second.epoch_samples != first.epoch_samples
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    second.broadcast_from_rank_zero()
    assert second.epoch_samples == first.epoch_samples
    assert second.first_window == {"train": second_train, "val": first.first_window["val"]}


def num_held_out(fraction: float, *groups: list[str]) -> list[int]:
    """The number of held-out group keys of each shard group."""
    holdout = Holdout(fraction, groups)
    return [sum(fake_sample("s", 0, group_key=k) in holdout for k in keys) for keys in groups]


@pytest.mark.parametrize("size", range(1, 7))
def test_a_small_set_holds_out_at_least_one_sample_but_never_all(size: int) -> None:
    for name in "abcdefgh":
        keys = [f"{name} {i}" for i in range(size)]
        assert num_held_out(0.0, keys) == [0]
        assert num_held_out(0.001, keys) == [min(1, size - 1)]
        assert num_held_out(0.999, keys) == [size - 1]
        assert num_held_out(0.999, [f"one {name}"], keys)[0] == 0
        assert num_held_out(0.999, keys, [f"one {name}"])[0] < size
