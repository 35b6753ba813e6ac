"""New words of a pipeline: for which text encoder, with a LoRA, and removed without a trace."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.formats.conftest import CONFIGS, random_model
from wuerstchen_pl import WuerstchenPipeline
from wuerstchen_pl.formats import registry
from wuerstchen_pl.formats.word_files import FILE, write_words
from wuerstchen_pl.models.words import Word

PROMPT = "a <rex> and <max>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cascade whose text encoders have widths of 16, in Stage C, and 12, in Stage B."""
    path = tmp_path_factory.mktemp("model") / "model"
    registry.write_model(random_model(), path, "native")
    return path


@pytest.fixture
def pipe(model: Path) -> Any:
    return WuerstchenPipeline.from_pretrained(model)


@torch.no_grad()
def embeddings(pipe: Any) -> tuple[Tensor, Tensor]:
    """Of Stage C and of Stage B."""
    return pipe.encode_prompt(PROMPT)[0], pipe.decoder.text_encoder([PROMPT])


def equal(pipe: Any, before: tuple[Tensor, Tensor]) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(embeddings(pipe), before, strict=True)]


@pytest.mark.parametrize(
    ("tensors", "unchanged"),
    [
        ({"clip_g": (2, 16)}, [False, True]),
        ({"clip_h": (1, 12)}, [True, False]),
        ({"clip_g": (2, 16), "clip_h": (1, 12)}, [False, False]),
        ({"<rex>": (3, 16)}, [False, True]),
        ({"<rex>": (3, 12)}, [True, False]),
        ({"<rex>": (3, 12), "<max>": (1, 16)}, [False, False]),
    ],
)
def test_a_word_is_for_the_text_encoder_of_its_name_or_width(
    tensors: dict[str, tuple[int, int]], unchanged: list[bool], pipe: Any, tmp_path: Path
) -> None:
    before = embeddings(pipe)
    path = tmp_path / "<rex>.safetensors"
    save_file({name: torch.randn(shape) for name, shape in tensors.items()}, path)
    pipe.load_words(path)
    assert equal(pipe, before) == unchanged
    pipe.unload_words()
    assert equal(pipe, before) == [True, True]
    assert pipe.words == []


def test_words_are_loaded_and_unloaded_one_by_one_under_diffusers_names(
    pipe: Any, tmp_path: Path
) -> None:
    before = embeddings(pipe)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write_words(tmp_path / name, [Word("<old>", torch.randn(1, 16))], "clip_g")
    pipe.load_textual_inversion([tmp_path / "first", tmp_path / "second"], ["<rex>", "<max>"])
    assert pipe.words == ["<rex>", "<max>"]
    with_both = embeddings(pipe)
    pipe.unload_textual_inversion("<rex>")
    assert pipe.words == ["<max>"]
    assert equal(pipe, before) == equal(pipe, with_both) == [False, True]
    pipe.load_textual_inversion(str(tmp_path / "first"), token="<rex>")
    assert equal(pipe, with_both) == [True, True]
    pipe.unload_textual_inversion(["<max>", "<rex>"])
    assert equal(pipe, before) == [True, True]


def test_a_word_keeps_its_embedding_in_another_type_and_with_a_lora(
    pipe: Any, tmp_path: Path
) -> None:
    width, state = CONFIGS["prior"]["width"], pipe.prior.prior.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    key = "prior.blocks.2.attention.to_q.lora"
    lora = {f"{key}_A.weight": torch.randn(2, width), f"{key}_B.weight": torch.randn(width, 2)}
    save_file(lora, tmp_path / "lora.safetensors")
    save_file({"<rex>": torch.randn(2, 16)}, tmp_path / FILE)
    pipe.load_words(tmp_path)
    expected = embeddings(pipe)
    pipe.load_lora(tmp_path / "lora.safetensors")
    assert equal(pipe, expected) == [True, True]
    pipe.unload_words()
    pipe.unload_lora()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
    pipe.load_words(tmp_path)
    pipe.to(torch.bfloat16)
    embedded = embeddings(pipe)[0]
    assert embedded.dtype == torch.bfloat16
    error = (embedded.float() - expected[0]).norm() / expected[0].norm()
    assert 0 < float(error) < 0.1


def test_words_that_do_not_fit_are_refused_and_change_nothing(pipe: Any, tmp_path: Path) -> None:
    save_file({"<rex>": torch.randn(1, 16)}, tmp_path / FILE)
    pipe.load_words(tmp_path)
    before = embeddings(pipe)
    for tensors, message in [
        ({"<rex>": torch.zeros(1, 16)}, "the word '<rex>' appears twice"),
        ({"cat": torch.zeros(1, 16)}, "the word 'cat' is a token of the vocabulary already"),
        ({"<max>": torch.zeros(1, 16), "<MAX>": torch.zeros(1, 16)}, "appears twice"),
        ({"<max>": torch.zeros(1, 9)}, "a width of 9, but the text encoders of .* have 16 and 12"),
        ({"clip_h": torch.zeros(1, 16)}, "a width of 16, but the text encoder's is 12"),
    ]:
        save_file(tensors, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=message):
            pipe.load_words(tmp_path / "other.safetensors")
        assert equal(pipe, before) == [True, True]
    with pytest.raises(ValueError, match="no word '<max>' is loaded; choose from <rex>"):
        pipe.unload_words("<max>")
    pipe.decoder.text_encoder = None
    save_file({"clip_h": torch.zeros(1, 12)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="'other' is for Stage B"):
        pipe.load_words(tmp_path / "other.safetensors")
