"""Counts of bad data: their examples, their limit and their summary."""

import warnings
from collections import Counter

import pytest

from wuerstchen_pl.data.loading.loader import check_counts
from wuerstchen_pl.data.ordering.stats import DataStats, format_counts
from wuerstchen_pl.data.sources.source import SampleError


def stats(limit: float = 1.0, **counts: int) -> DataStats:
    """Stats with these counts; ``__`` stands for a slash."""
    result = DataStats(limit=limit)
    result.counts.update({name.replace("__", "/"): n for name, n in counts.items()})
    return result


def test_the_first_three_examples_of_each_reason_are_shown_and_all_are_counted() -> None:
    noted = DataStats()
    errors = [
        error
        for i in range(5)
        for error in (
            SampleError("no caption", f"a/{i}", count=2),
            SampleError("no image", f"b/{i}"),
        )
    ]
    with pytest.warns(UserWarning, match="skipped") as shown:
        list(map(noted.note_bad, errors))
    more = " (further ones are only counted)"
    assert [str(w.message) for w in shown] == [
        f"skipped, {reason}: {folder}/{i}{more if i == 2 else ''}"
        for i in range(3)
        for reason, folder in (("no caption", "a"), ("no image", "b"))
    ]
    assert noted.counts == {"bad/no caption": 10, "bad/no image": 5}


def test_examples_are_not_shown_on_request() -> None:
    noted = DataStats(show=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        noted.note_bad(SampleError("no image", "a/0"))
    assert noted.counts == {"bad/no image": 1}


def test_bad_samples_up_to_their_limit_and_of_fewer_than_a_thousand_are_allowed() -> None:
    at_limit = {"bad__no_caption": 100, "bad__no_image": 100}
    stats(limit=0.2, seen=800, **at_limit).check()
    with pytest.raises(ValueError, match=r"200 of 1000 samples are bad, .*=0\.19 "):
        stats(limit=0.19, seen=800, **at_limit).check()
    with pytest.raises(ValueError, match=r"\(800 samples read [^;]*; bad: [^;]*\); fix the data"):
        stats(limit=0.19, seen=800, **at_limit).check()
    stats(limit=0.0, seen=799, **at_limit).check()
    # dropped samples are not bad
    stats(limit=0.0, seen=2000, dropped__min_size=1500).check(of_shards=100)


def test_samples_that_are_found_to_be_bad_later_were_seen_before() -> None:
    bad = stats(limit=0.2, seen=900, bad__no_image=100)
    bad.check(more_bad=100)
    with pytest.raises(ValueError, match=r"201 of 1000 samples .*; 101 unreadable images\);"):
        bad.check(more_bad=101)


def test_broken_shards_up_to_their_limit_and_of_fewer_than_twenty_are_allowed() -> None:
    def check(broken: int, opened: int, of_shards: int) -> None:
        stats(limit=0.25, shards=opened, shards__broken=broken).check(of_shards=of_shards)

    check(5, 20, of_shards=20)
    with pytest.raises(ValueError, match="6 of 20 shards are bad"):
        check(6, 20, of_shards=20)
    check(6, 19, of_shards=20)  # too few were opened
    check(6, 20, of_shards=19)  # the same few were opened repeatedly


def test_the_summary_lists_dropped_and_bad_samples_by_name() -> None:
    counts = Counter({"seen": 9, "shards": 2, "shards/broken": 1, "pixels": 7})
    assert format_counts(counts) == "9 samples read from 2 shards"
    counts.update({"bad/no image": 1, "dropped/min_size": 3, "dropped/duplicate": 2})
    expected = "9 samples read from 2 shards; dropped: 2 duplicate, 3 min_size; bad: 1 no image"
    assert format_counts(counts) == expected
    noted = DataStats()
    noted.counts = counts
    assert noted.summary() == expected


def test_bad_images_of_one_process_count_among_the_samples_of_all() -> None:
    order = Counter({"seen": 1000, "shards": 1})
    check_counts([order] * 4, unreadable=50, limit=0.05)
    with pytest.raises(ValueError, match="51 of 1000 samples are bad") as error:
        check_counts([order] * 4, unreadable=51, limit=0.05)
    assert "(1000 samples read from 1 shard; 51 unreadable images)" in str(error.value)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_process_that_lists_other_samples_is_an_error(rank: int) -> None:
    """Its batches would be others, and samples would be repeated or left out."""
    orders = [Counter({"seen": 10, "shards": 2}) for _ in range(3)]
    check_counts(orders, unreadable=0, limit=1.0)
    orders[rank]["bad/damaged shard"] = 1
    with pytest.raises(ValueError, match=rf"^process {rank or 1} lists other samples than proc"):
        check_counts(orders, unreadable=0, limit=1.0)
