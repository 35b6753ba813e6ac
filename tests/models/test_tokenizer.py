"""The cache of words does not change what a caption is encoded to."""

import pytest

from wuerstchen_pl.models import tokenizer
from wuerstchen_pl.models.tokenizer import Tokenizer

CAPTIONS = [
    "A red  heart",
    "a RED heart\u2764",
    "\u039f\u0394\u039f\u03a3 street 42",
    "a heart's red, red tea",
]


def test_words_from_the_cache_have_the_tokens_of_new_words(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [Tokenizer().encode(caption) for caption in CAPTIONS]
    monkeypatch.setattr(tokenizer, "CACHED_WORDS", 3)
    small = Tokenizer()
    for _ in range(2):
        assert [small.encode(caption) for caption in CAPTIONS] == expected
        assert len(small._ids_by_word) <= 3
        assert len(small.bpe.cache) <= 3 + len(small._unsplit)
