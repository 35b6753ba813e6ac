"""New words in training: what their vectors start from."""

from typing import Any

import pytest
import torch

from wuerstchen_pl.adapters.words import NewWords
from wuerstchen_pl.models.text import TextEncoder


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(width=16, depth=1, num_heads=2, context_length=12).eval()


@torch.no_grad()
def test_vectors_start_from_a_phrase_or_the_mean_of_a_pattern(encoder: TextEncoder) -> None:
    tokens = encoder.tower.token_embedding.weight
    red, dog = (int(encoder.tokenizer.encode(word)[0]) for word in ("red", "dog"))
    phrase, mean = tokens[[red, dog]], tokens[[red, dog]].mean(dim=0)
    corgi = tokens[encoder.tokenizer.encode("corgi")[0]]
    terrier = tokens[encoder.tokenizer.encode("terrier terriers")].mean(dim=0)
    ends_word = [i for i, token in encoder.tokenizer.bpe.decoder.items() if "</w>" in token]
    cases: list[tuple[str, int, Any]] = [
        ("red dog", 2, phrase),
        ("red dog", 1, [mean]),
        ("red dog", 3, [mean] * 3),
        ("*corgi*", 1, [corgi]),
        ("terrier*", 2, [terrier] * 2),
        ("*", 2, [tokens[ends_word].mean(dim=0)] * 2),
    ]
    for init, number, expected in cases:
        words = NewWords(text="<rex>", init=init, num_vectors=number)
        words.add_to(encoder)
        expected = torch.stack(list(expected))
        torch.testing.assert_close(words[0].vectors, expected, msg=lambda m, i=init: f"{i}: {m}")
        encoder.set_words([])


def test_a_pattern_matches_whole_words_and_no_special_tokens(encoder: TextEncoder) -> None:
    tokenizer = encoder.tokenizer
    matching = [tokenizer.decode([i]) for i in tokenizer.matching("Dog*")]
    assert {"dog", "dogs"} <= set(matching)
    assert len(matching) == len(set(matching)), "beginnings of longer words do not match"
    assert all(token.startswith("dog") for token in matching)
    assert not {tokenizer.start, tokenizer.end} & set(tokenizer.matching("*"))


@torch.no_grad()
def test_a_new_word_is_read_like_what_it_starts_from(encoder: TextEncoder) -> None:
    expected = encoder(["a red dog runs", "a cat"])
    NewWords(text="<old>", init="snow").add_to(encoder)
    words = NewWords(text=["<rex>", "<max>"], init=["red dog", "*cat*"], num_vectors=2)
    words.add_to(encoder)
    assert torch.equal(encoder(["a <rex> runs", "a cat"]), expected)
    assert not torch.equal(encoder(["a <max> runs", "a cat"])[0], expected[0])
    assert torch.equal(*encoder(["a snow", "a <old>"]))
    encoder.set_words([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "<rex>", "num_vectors": 0}, "num_vectors=0 is out of range"),
        ({"text": []}, "each word needs its own"),
        ({"text": ["<a>", "<b>"], "init": ["cat"]}, "each word needs its own"),
        ({"text": "<rex>", "init": "*qqqqqq*"}, "init='[*]qqqqqq[*]' has no token"),
        ({"text": "<rex>", "init": ""}, "init='' has no token"),
        ({"text": ["<rex>", "<rex>"]}, "'<rex>' appears twice"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: dict[str, Any], message: str, encoder: TextEncoder
) -> None:
    with pytest.raises(ValueError, match=message):
        NewWords(**arguments).add_to(encoder)
    assert encoder.words == ()
