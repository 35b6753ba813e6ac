"""Numbers of things in messages."""

import pytest

from wuerstchen_pl.plural import plural


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        *((1, "shard", "1 shard"), (0, "shard", "0 shards"), (2, "shard", "2 shards")),
        *((1, "process", "1 process"), (3, "process", "3 processes")),
        (2, "unreadable image", "2 unreadable images"),
    ],
)
def test_a_noun_agrees_with_its_number(number: int, noun: str, text: str) -> None:
    assert plural(number, noun) == text
