"""The text encoder against open_clip's, and the padding of the published models."""

import pytest
import torch
from open_clip.model import CLIPTextCfg, _build_text_tower

from wuerstchen_pl.models.text import TextEncoder

END_OF_TEXT = 49407
CAPTIONS = ["a red heart", "wow! what an image", ""]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(width=32, depth=2, num_heads=4, context_length=77).eval()


def test_captions_are_padded_with_the_end_token(encoder: TextEncoder) -> None:
    ids, _ = encoder.tokenizer(CAPTIONS)
    for row, caption in zip(ids, CAPTIONS, strict=True):
        used = len(encoder.tokenizer.encode(caption)) + 2
        assert int(row[0]) == END_OF_TEXT - 1
        assert (row[used - 1 :] == END_OF_TEXT).all()
        assert (row[: used - 1] != END_OF_TEXT).all()
    # "!" is token 0, which open_clip pads with; it must not be treated as padding
    assert len(encoder.tokenizer.encode("wow! what an image")) + 2 == 7


@torch.no_grad()
def test_embeddings_of_words_equal_open_clips(encoder: TextEncoder) -> None:
    ids, _ = encoder.tokenizer(CAPTIONS)
    tower = _build_text_tower(32, CLIPTextCfg(width=32, heads=4, layers=2))
    tower.load_state_dict({**encoder.tower.state_dict(), "text_projection": torch.zeros(32, 32)})
    tower.output_tokens = True
    expected = tower.eval()(ids)[1]
    actual = encoder(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        used = len(encoder.tokenizer.encode(caption)) + 2
        torch.testing.assert_close(actual[row, :used], expected[row, :used], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_is_masked_as_a_key(encoder: TextEncoder) -> None:
    ids, mask = encoder.tokenizer(["a red heart"])
    before = encoder.encode(ids, mask)
    # With padding masked, positions attend to the caption only: changing the position embedding of
    # one padded position does not change those after it.
    with torch.no_grad():
        encoder.tower.positional_embedding[20, ::2] += 10
    after = encoder.encode(ids, mask)
    encoder.tower.positional_embedding.data[20, ::2] -= 10
    torch.testing.assert_close(before[0, 21:], after[0, 21:])
    assert (before[0, 20] - after[0, 20]).abs().max() > 0.1


def test_weights_are_loaded_from_a_whole_clip_model(encoder: TextEncoder, tmp_path: object) -> None:
    state = {**encoder.tower.state_dict(), "visual.conv1.weight": torch.zeros(1)}
    path = f"{tmp_path}/clip.pt"
    torch.save(state, path)
    loaded = TextEncoder(width=32, depth=2, num_heads=4, context_length=77, weights=path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(CAPTIONS), encoder(CAPTIONS))
    torch.save({"visual.conv1.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="give an open_clip checkpoint"):
        TextEncoder(width=32, depth=2, num_heads=4, context_length=77, weights=path)


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("  ... !", "contains no word"),
        ("\N{FOX FACE}\N{RED APPLE}", "contains no word"),
        ("a\0b", "control character"),
    ],
)
def test_prompts_that_cannot_be_interpreted_are_rejected(
    encoder: TextEncoder, prompt: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        encoder.check(prompt)


def test_cut_off_returns_the_truncated_end_of_a_caption(encoder: TextEncoder) -> None:
    assert encoder.cut_off("word " * 75) == ""
    assert encoder.cut_off("word " * 75 + "red heart") == "red heart"
    (truncated, exact), _ = encoder.tokenizer(["word " * 75 + "red heart", "word " * 75])
    assert torch.equal(truncated, exact)


def test_ordinary_prompts_pass(encoder: TextEncoder) -> None:
    for prompt in ("a red heart", "Würstchen, 3 of them", "\N{FOX FACE} fox", "犬"):
        encoder.check(prompt)
