"""Files of new words: diffusers' and OneTrainer's.

diffusers' ``learned_embeds.safetensors`` has the vectors by word. In OneTrainer's, which ComfyUI
reads too, the word is the name of the file, and the vectors are named by their text encoder.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from wuerstchen_pl.checkpointing.finite import check_finite
from wuerstchen_pl.formats.lazy_tensors import in_memory, write_safetensors
from wuerstchen_pl.formats.registry import resolve_source
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
    path = resolve_source(str(path))
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"words={path} does not exist; use a .safetensors file of a word")
    tensors, name = _read(file)
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


def _read(file: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file, and the word of its header, or of its name."""
    try:
        with safe_open(file, "pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            name = (content.metadata() or {}).get(WORD, file.stem)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or not a safetensors file: {error}") from error
    check_finite(tensors, str(file))
    return tensors, name
