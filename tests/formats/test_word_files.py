"""Files of new words: of this package, diffusers and OneTrainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from tests.formats.conftest import CONFIGS, random_part
from wuerstchen_pl.formats import registry
from wuerstchen_pl.formats.lazy_tensors import in_memory
from wuerstchen_pl.formats.model import Model, build_network
from wuerstchen_pl.formats.word_files import FILE, read_words, write_words
from wuerstchen_pl.models.words import Word


def words() -> list[Word]:
    torch.manual_seed(0)
    return [Word("<rex>", torch.randn(2, 16)), Word("<max>", torch.randn(1, 16))]


def test_files_are_as_diffusers_and_onetrainer_write_them(tmp_path: Path) -> None:
    rex, dog = words()
    files = write_words(tmp_path, [rex, dog], "clip_g")
    assert [file.name for file in files] == [FILE, "rex.safetensors", "max.safetensors"]
    learned, clip = load_file(files[0]), load_file(files[1])
    assert learned.keys() == {"<rex>", "<max>"}
    assert torch.equal(learned["<max>"], dog.vectors)
    assert clip.keys() == {"clip_g"}
    assert torch.equal(clip["clip_g"], rex.vectors)


def test_words_with_the_same_file_name_have_files_of_their_own(tmp_path: Path) -> None:
    vectors = torch.randn(1, 4)
    files = write_words(tmp_path, [Word("<rex>", vectors), Word("rex", 2 * vectors)], "clip_h")
    texts = [read_words(file)[0].word.text for file in files[1:]]
    assert texts == ["<rex>", "rex"]


@pytest.mark.parametrize("tower", ["clip_g", "clip_h"])
def test_both_files_are_read_back_exactly(tower: Any, tmp_path: Path) -> None:
    written = words()
    files = write_words(tmp_path, written, tower)
    for stored, expected_tower in [
        (read_words(tmp_path), None),
        ([*read_words(files[1]), *read_words(files[2])], tower),
    ]:
        assert [entry.tower for entry in stored] == [expected_tower] * 2
        vectors = {entry.word.text: entry.word.vectors for entry in stored}
        assert vectors.keys() == {word.text for word in written}
        assert all(torch.equal(vectors[word.text], word.vectors) for word in written)
        assert not any(tensor.requires_grad for tensor in vectors.values())


def test_files_of_others_are_read(tmp_path: Path) -> None:
    """Of both text encoders, in another precision, or with one vector without its number."""
    both = {"clip_g": torch.randn(2, 16).half(), "clip_h": torch.randn(3, 12)}
    save_file(both, tmp_path / "my-dog.safetensors")
    stored = read_words(tmp_path / "my-dog.safetensors")
    assert {entry.tower: entry.word.text for entry in stored} == dict.fromkeys(both, "my-dog")
    for entry in stored:
        assert entry.tower is not None
        assert torch.equal(entry.word.vectors, both[entry.tower].float())
    (first, _) = read_words(tmp_path / "my-dog.safetensors", "<dog>")
    assert first.word.text == "<dog>"
    vector = torch.randn(16)
    save_file({"<old>": vector}, tmp_path / FILE)
    (old,) = read_words(tmp_path)
    assert torch.equal(old.word.vectors, vector[None])


@pytest.mark.parametrize(
    ("tensors", "text", "message"),
    [
        ({}, None, "has no vectors of a word"),
        ({"<rex>": torch.zeros(1, 2, 16)}, None, "has no vectors of a word"),
        ({"<rex>": torch.zeros(1, 16, dtype=torch.int64)}, None, "has no vectors of a word"),
        ({"<rex>": torch.full((1, 16), torch.nan)}, None, "that are not finite"),
        ({"<a>": torch.zeros(1, 16), "<b>": torch.zeros(1, 16)}, "<c>", "has several words"),
    ],
)
def test_other_files_are_refused(
    tensors: dict[str, torch.Tensor], text: str | None, message: str, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(ValueError, match=message):
        read_words(tmp_path, text)


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"words={tmp_path} does not exist"):
        read_words(tmp_path)
    (tmp_path / FILE).write_bytes(b"no")
    with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
        read_words(tmp_path)


class DiffusersTextEncoder(TextualInversionLoaderMixin):
    """The parts of a pipeline of diffusers that read new words."""

    hf_device_map = None

    def __init__(self, folder: Path) -> None:
        self.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.components = {"text_encoder": self.text_encoder, "tokenizer": self.tokenizer}

    def __call__(self, prompt: str) -> torch.Tensor:
        converted = self.maybe_convert_prompt(prompt, self.tokenizer)
        inputs = self.tokenizer(
            converted, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
        )
        return self.text_encoder(**inputs).last_hidden_state


@torch.no_grad()
@pytest.mark.parametrize("number", [1, 3])
def test_diffusers_reads_the_file_and_a_prompt_has_the_same_embedding(
    number: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    part = random_part(CONFIGS["prior_text_encoder"])
    part.tensors = {name: in_memory(0.1 * lazy.load()) for name, lazy in part.tensors.items()}
    model = Model({"prior_text_encoder": part, "prior": random_part(CONFIGS["prior"])})
    registry.write_model(model, tmp_path / "model", "diffusers")
    theirs_at = next((tmp_path / "model").rglob("text_encoder")).parent
    write_words(tmp_path, [Word("<rex>", torch.randn(number, 16))], "clip_g")
    reference = DiffusersTextEncoder(theirs_at)
    reference.load_textual_inversion(str(tmp_path))
    encoder: Any = build_network(part)
    prompt = "a photo of <rex> in the snow"
    without = encoder([prompt])
    encoder.set_words([entry.word for entry in read_words(tmp_path)])
    torch.testing.assert_close(encoder([prompt]), reference(prompt), atol=2e-5, rtol=1e-4)
    assert float((encoder([prompt]) - without).abs().max()) > 0.01
