"""Prompts and their embeddings: repetition, negative prompts and refusals."""

from typing import Any

import pytest
import torch
from torch import Tensor

from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.sampling.prompts import Prompts, count_prompts, encode_prompts, encode_texts


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(width=16, depth=1, num_heads=2, context_length=8).eval()


def encode(encoder: TextEncoder, repeats: int = 1, guided: bool = True, **prompts: Any) -> Tensor:
    with torch.no_grad():
        return encode_prompts(encoder, Prompts(**prompts), repeats=repeats, guided=guided)


def test_each_prompt_is_repeated_and_followed_by_the_negative_ones(encoder: TextEncoder) -> None:
    with torch.no_grad():
        cat, dog, blue, red, empty = encoder(["cat", "dog", "blue", "red", ""])
    pair = {"prompt": ["cat", "dog"]}
    two = {**pair, "negative": ["blue", "red"]}
    for prompts, repeats, guided, rows in (
        (pair, 1, False, [cat, dog]),
        (pair, 2, False, [cat, cat, dog, dog]),
        (pair, 1, True, [cat, dog, empty, empty]),
        ({**pair, "negative": "blue"}, 1, True, [cat, dog, blue, blue]),
        ({**pair, "negative": ["blue"]}, 1, True, [cat, dog, blue, blue]),
        (two, 1, True, [cat, dog, blue, red]),
        (two, 2, True, [cat, cat, dog, dog, blue, blue, red, red]),
        ({**pair, "negative": "blue"}, 1, False, [cat, dog]),
        ({"prompt": "cat"}, 2, True, [cat, cat, empty, empty]),
        ({"prompt": ["cat", "dog", "cat"]}, 1, False, [cat, dog, cat]),
    ):  # fmt: skip
        actual = encode(encoder, repeats, guided, **prompts)
        torch.testing.assert_close(actual, torch.stack(rows))


def test_embeddings_replace_texts(encoder: TextEncoder) -> None:
    with torch.no_grad():
        embeds, negative = encoder(["cat", "dog"]), encoder(["blue", "red"])
    expected = encode(encoder, 2, prompt=["cat", "dog"], negative=["blue", "red"])
    for prompts in (
        {"embeds": embeds, "negative_embeds": negative},
        {"embeds": embeds, "negative": ["blue", "red"]},
        {"prompt": ["cat", "dog"], "negative_embeds": negative},
        {"prompt": ["cat", "dog"], "negative_embeds": negative.double()},
    ):
        torch.testing.assert_close(encode(encoder, 2, **prompts), expected)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({}, "neither prompt nor prompt_embeds"),
        ({"negative": "a"}, "neither prompt nor prompt_embeds"),
        ({"prompt": "a", "embeds": torch.zeros(1, 8, 16)}, "prompt and prompt_embeds are both"),
        (
            {"prompt": "a", "negative": "b", "negative_embeds": torch.zeros(1, 8, 16)},
            "negative_prompt and negative_prompt_embeds are both",
        ),
        ({"prompt": ["a", "b", "c"], "negative": ["d", "e"]}, "2 negative prompts for 3"),
        ({"embeds": torch.zeros(2, 8, 16), "negative": ["d"] * 3}, "3 negative prompts for 2"),
        ({"prompt": ["a", 1]}, "is not text"),
        ({"prompt": {"a": 1}}, "is not text"),
        ({"prompt": "a", "negative": []}, r"negative_prompt=\[\] is not text"),
    ],
)
def test_inconsistent_prompts_are_rejected(prompts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count_prompts(Prompts(**prompts))


def test_prompts_are_counted_as_texts_or_embeddings() -> None:
    assert count_prompts(Prompts("a")) == 1
    assert count_prompts(Prompts("")) == 1
    assert count_prompts(Prompts(("a", "b"), "c")) == 2
    assert count_prompts(Prompts(embeds=torch.zeros(3, 8, 16), negative=["a", "b", "c"])) == 3


@pytest.mark.parametrize("shape", [(8,), (8, 16), (1, 8, 17), (1, 1, 8, 16)])
def test_embeddings_of_another_shape_are_rejected(
    shape: tuple[int, ...], encoder: TextEncoder
) -> None:
    with pytest.raises(ValueError, match="prompt_embeds have shape"):
        encode(encoder, embeds=torch.zeros(shape))


@pytest.mark.parametrize("repeats", [0, -1, 1.5])
def test_a_number_of_images_out_of_range_is_rejected(repeats: int, encoder: TextEncoder) -> None:
    with pytest.raises(ValueError, match=f"num_images_per_prompt={repeats} is out of range"):
        encode(encoder, repeats, prompt="a")


def test_a_truncated_caption_is_warned_about_once(encoder: TextEncoder) -> None:
    long = "apple " * 6 + "red heart"
    with pytest.warns(UserWarning, match="reads 8 tokens") as shown:
        encode_texts(encoder, [long, "cat", long])
    assert len(shown) == 1
