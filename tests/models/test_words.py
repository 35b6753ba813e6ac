"""New words of a text encoder: which captions have them, their embeddings, and what is refused."""

import pytest
import torch

from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.models.words import Word

CAPTIONS = ["a <rex> and zorp", "A <REX>, azorp & zorpes", "the longer <rex>y Zorp2", ""]


@pytest.fixture
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(width=16, depth=2, num_heads=2, context_length=12).eval()


def word(text: str, number: int = 1, width: int = 16) -> Word:
    rng = torch.Generator().manual_seed(number)
    return Word(text, torch.randn(number, width, generator=rng))


def test_a_new_word_is_found_wherever_it_is_a_word(encoder: TextEncoder) -> None:
    encode, first = encoder.tokenizer.encode, encoder.tower.vocab_size
    parts = ("a", "and", "the longer", ",", "azorp", "&", "zorpes", "y", "2")
    a, and_, longer, comma, azorp, ampersand, zorpes, y, two = map(encode, parts)
    encoder.set_words([word("<rex>", 2), word("zorp")])
    bracketed, plain = [first, first + 1], [first + 2]
    assert encode(CAPTIONS[0]) == [*a, *bracketed, *and_, *plain]
    assert encode(CAPTIONS[1]) == [*a, *bracketed, *comma, *azorp, *ampersand, *zorpes]
    assert encode(CAPTIONS[2]) == [*longer, *bracketed, *y, *plain, *two]
    encoder.set_words([word("zorp"), word("zorp2", 2)])
    assert encode(CAPTIONS[2])[-2:] == [first + 1, first + 2]


@torch.no_grad()
def test_a_word_with_the_vectors_of_tokens_is_read_like_these_tokens(encoder: TextEncoder) -> None:
    tokens = encoder.tower.token_embedding.weight[encoder.tokenizer.encode("red apple")]
    expected = encoder(["a red apple pie", "pie"])
    encoder.set_words([word("<other>", 3), Word("<rex>", tokens)])
    assert torch.equal(encoder(["a <rex> pie", "pie"]), expected)


@torch.no_grad()
def test_without_its_words_an_encoder_is_as_before(encoder: TextEncoder) -> None:
    before, names = encoder(CAPTIONS), encoder.state_dict().keys()
    encoder.set_words([word("<rex>", 2), word("zorp")])
    with_words = encoder(CAPTIONS)
    assert encoder.state_dict().keys() == names
    assert [torch.equal(*rows) for rows in zip(with_words, before, strict=True)] == [
        *[False] * 3, True,
    ]  # fmt: skip
    encoder.set_words([])
    assert torch.equal(encoder(CAPTIONS), before)


def test_a_word_that_is_cut_off_is_shown_and_does_not_count(encoder: TextEncoder) -> None:
    encoder.set_words([word("<Rex>", 2), word("собака7", 3)])
    has_word = encoder.tokenizer.has_word
    assert has_word("<Rex>", "red " * 8 + "<rex> red")
    assert not has_word("<Rex>", "red " * 9 + "<rex> red")
    assert not has_word("<Rex>", "a собака7")
    assert has_word("собака7", "a Собака7")
    assert encoder.cut_off("red " * 10 + "<rex> собака7 heart") == "<rex> собака7 heart"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([word("cat")], "the word 'cat' is a token of the vocabulary already"),
        ([word("Cat")], "the word 'Cat' is a token of the vocabulary already"),
        ([word("<rex>"), word("<REX>", 2)], "the word '<REX>' appears twice"),
        ([word("my rex")], "'my rex' is not one word"),
        ([word("<rex>", width=8)], "'<rex>' have a width of 8, but the text encoder's is 16"),
    ],
)
def test_a_word_that_does_not_fit_is_refused(
    words: list[Word], message: str, encoder: TextEncoder
) -> None:
    encoder.set_words([word("<max>")])
    before = encoder(["a <max>"])
    with pytest.raises(ValueError, match=message):
        encoder.set_words(words)
    assert torch.equal(encoder(["a <max>"]), before)


def test_vectors_of_another_shape_are_refused() -> None:
    for shape in ((16,), (0, 16), (1, 2, 16)):
        with pytest.raises(ValueError, match="use one of"):
            Word("<rex>", torch.zeros(shape))
