import dataclasses
from typing import Any

import pytest

from tests.data.factories import fake_sample
from wuerstchen_pl.data.ordering.filters import Filters

SCORES = {"pwatermark": 0.2, "punsafe": 0.1, "aesthetic": 6.0}


@pytest.mark.parametrize(
    ("settings", "width", "height", "expected"),
    [
        ({"min_size": 512}, 512, 900, None),
        ({"min_size": 512}, 511, 900, "min_size"),
        ({"max_size": 900}, 512, 900, None),
        ({"max_size": 899}, 512, 900, "max_size"),
        ({"max_ratio": 2}, 100, 200, None),
        ({"max_ratio": 2}, 201, 100, "max_ratio"),
        ({"max_ratio": 1, "min_size": 64, "max_size": 64}, 64, 64, None),
        ({"max_ratio": 1}, 64, 65, "max_ratio"),
    ],
)
def test_shape(settings: Any, width: int, height: int, expected: str | None) -> None:
    sample = fake_sample("s", 0, width, height)
    assert Filters(**settings).apply(sample) == (expected or sample)


@pytest.mark.parametrize(
    ("settings", "metadata", "expected"),
    [
        ({"max_pwatermark": 0.5}, {"pwatermark": 0.5}, None),
        ({"max_pwatermark": 0.5}, {"pwatermark": 0.51}, "max_pwatermark"),
        ({"max_pwatermark": 0.5}, {}, "no pwatermark"),
        ({"max_punsafe": 0.99}, {"punsafe": 0.995}, "max_punsafe"),
        ({"max_punsafe": 0.99}, {"punsafe": 0.99}, None),
        ({"max_punsafe": 0.99}, {}, "no punsafe"),
        ({"max_punsafe": 0.0, "max_pwatermark": 0.0}, {"punsafe": 0.0, "pwatermark": 0.0}, None),
        ({"min_aesthetic": 5}, {"aesthetic": 4.9}, "min_aesthetic"),
        ({"min_aesthetic": 5}, {"AESTHETIC_SCORE": 4.9}, "min_aesthetic"),
        ({"min_aesthetic": 5}, {"AESTHETIC_SCORE": 5.0}, None),
        ({"min_aesthetic": 5}, {"AESTHETIC_SCORE": 5.0, "aesthetic": 4.9}, "min_aesthetic"),
        ({"min_aesthetic": 0}, {"aesthetic": -0.5}, "min_aesthetic"),
        ({"min_aesthetic": 5}, {}, "no aesthetic"),
        ({"min_aesthetic": 5, "max_punsafe": 0.99, "max_pwatermark": 0.5}, SCORES, None),
    ],
)
def test_scores(settings: Any, metadata: dict[str, float], expected: str | None) -> None:
    sample = fake_sample("s", 0, metadata=metadata)
    assert Filters(**settings).apply(sample) == (expected or sample)


@pytest.mark.parametrize(
    ("settings", "caption", "expected"),
    [
        ({"min_words": 2}, "heart", "min_words"),
        ({"min_words": 2}, "red heart", None),
        ({"max_words": 2}, "a red heart", "max_words"),
        ({"min_words": 2, "max_words": 2}, "red heart", None),
        ({"scripts": ["latin"]}, "ein Bücherregal, 3 m", None),
        ({"scripts": ["latin"]}, "красное сердце", "scripts"),
        ({"scripts": ["latin", "cyrillic"]}, "красное сердце", None),
        ({"scripts": ["cjk", "hiragana", "katakana"]}, "赤いハート", None),
        ({"scripts": ["latin"]}, "I love 東京", None),
        ({"scripts": ["latin"]}, "in 東京都庁", "scripts"),
        ({"scripts": ["latin"]}, "東京 to", "scripts"),  # half of the letters is not most
        ({"scripts": ["latin"]}, "2024 !", None),
        ({"scripts": []}, "heart", "scripts"),
        ({"forbidden_words": ["Stock"]}, "a stock, photo", "forbidden_words"),
        ({"forbidden_words": ["stock"]}, "a stocking", None),
        ({"forbidden_words": ["stock", "clip"]}, 'a photo ("STOCK!")', "forbidden_words"),
        ({"forbidden_words": ["c++", "no."]}, "no. 5 in C++", "forbidden_words"),
        ({"forbidden_words": ["no."]}, "No. 5", "forbidden_words"),
    ],
)
def test_captions(settings: Any, caption: str, expected: str | None) -> None:
    sample = fake_sample("s", 0, captions=(caption,))
    assert Filters(**settings).apply(sample) == (expected or sample)


def test_only_passing_captions_are_kept() -> None:
    sample = fake_sample("s", 0, captions=("one", "one two", "one two three"))
    kept = Filters(min_words=2).apply(sample)
    assert not isinstance(kept, str)
    assert kept.captions == ("one two", "one two three")
    assert Filters(min_words=4).apply(sample) == "min_words"


def test_the_first_captions_reason_is_that_of_the_sample() -> None:
    sample = fake_sample("s", 0, captions=("one two three", "one"))
    assert Filters(min_words=2, max_words=2).apply(sample) == "max_words"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scripts": ["english"]}, r"english.\] contains .english.; choose from"),
        ({"min_size": 9, "max_size": 8}, r"min_size=9 exceeds .*max_size=8"),
        ({"min_words": 9, "max_words": 8}, r"min_words=9 exceeds"),
        ({"max_ratio": 0.5}, r"max_ratio=0\.5"),
    ],
)
def test_filters_that_nothing_can_pass_are_rejected(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Filters(**settings)


@pytest.mark.parametrize("options", [{}, {"min_words": 2}, {"forbidden_words": ["cat"]}])
def test_images_without_a_caption_are_used_if_none_is_required(options: dict[str, Any]) -> None:
    bare = dataclasses.replace(fake_sample("a", 0), captions=())
    assert Filters(**options).apply(bare) == "no caption"
    used = Filters(**options, require_caption=False).apply(bare)
    assert used == dataclasses.replace(bare, captions=("",))
    assert Filters(require_caption=False, min_size=999).apply(bare) == "min_size"
