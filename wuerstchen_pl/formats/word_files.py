"""Files of new words: diffusers' and OneTrainer's.

diffusers' ``learned_embeds.safetensors`` has the vectors by word. In OneTrainer's, which ComfyUI
reads too, the word is the name of the file, and the vectors are named by their text encoder.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple, cast

from torch import Tensor

from wuerstchen_pl.formats.hub import resolve_file
from wuerstchen_pl.formats.lazy_tensors import in_memory, read_small_file, write_safetensors
from wuerstchen_pl.models.words import Word

FILE = "learned_embeds.safetensors"
WORD = "word"
"""Key of the header of OneTrainer's file for a word that the name of the file abbreviates."""
Tower = Literal["clip_g", "clip_h"]
TOWERS: tuple[Tower, ...] = ("clip_g", "clip_h")
"""v2's text encoders: ViT-bigG-14 of Stage C and ViT-H-14 of Stage B."""


class StoredWord(NamedTuple):
    """A word of a file, and the text encoder it is for; None if the file does not name one."""

    word: Word
    tower: Tower | None


def write_words(folder: Path, words: Iterable[Word], tower: Tower) -> list[Path]:
    """Write words in both formats into an existing folder; returns the files."""
    vectors = {word.text: in_memory(word.vectors.detach()) for word in words}
    files = [folder / FILE]
    write_safetensors(files[0], vectors)
    stems = [_stem(text) for text in vectors]
    for number, (text, tensor) in enumerate(vectors.items()):
        suffix = "" if stems.count(stems[number]) == 1 else f"-{number}"
        files.append(folder / f"{stems[number]}{suffix}.safetensors")
        write_safetensors(files[-1], {tower: tensor}, {WORD: text})
    return files


def _stem(text: str) -> str:
    """``<rex>`` -> ``rex``, for file systems without other characters."""
    return re.sub(r"[^\w-]+", "", text) or WORD


def read_words(path: str | Path, text: str | None = None) -> list[StoredWord]:
    """Read words of either format.

    Args:
        path: the file, or a folder or hub id with ``learned_embeds.safetensors``.
        text: the word, instead of that in the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or has no vectors of a word, or several words and ``text``.
    """
    file = resolve_file(path, FILE, key="words", use="a .safetensors file of a word")
    tensors, header = read_small_file(file)
    name = header.get(WORD, file.stem)
    if not tensors or not all(map(_is_vectors, tensors.values())):
        raise ValueError(f"{file} has no vectors of a word; use another file")
    if tensors.keys() <= set(TOWERS):
        by_tower = cast(dict[Tower, Tensor], tensors)
        return [StoredWord(_word(text or name, t), tower) for tower, t in by_tower.items()]
    if text is not None and len(tensors) > 1:
        raise ValueError(f"{file} has several words, which cannot all be {text!r}; remove word=")
    return [StoredWord(_word(text or key, tensor), None) for key, tensor in tensors.items()]


def _is_vectors(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.ndim in (1, 2) and tensor.numel() > 0


def _word(text: str, vectors: Tensor) -> Word:
    """A word that is not trained; older files have a single vector without its number."""
    word = Word(text, vectors.reshape(-1, vectors.shape[-1]))
    word.requires_grad_(False)
    return word
