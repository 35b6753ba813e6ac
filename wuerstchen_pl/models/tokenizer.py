"""CLIP's tokenizer: open_clip's byte-pair encoding, with its vocabulary or a published one."""

import copy
import functools
import json
import unicodedata
from collections import ChainMap
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import regex as re
import torch
from torch import Tensor

from wuerstchen_pl.io.contents import contents_of

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer

# \p{White_Space}, not \s: Python also counts the separators 0x1c to 0x1f as white space
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\p{White_Space}\p{L}\p{N}]+"
WHITE_SPACE = re.compile(r"\p{White_Space}+")
CACHED_WORDS = 100_000
"""Number of words whose tokens are kept, which takes about 35 MB."""
START, END = "<|startoftext|>", "<|endoftext|>"
FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
"""Files that the folder of a published tokenizer may contain."""


@functools.cache
def _open_clip_tokenizer() -> "SimpleTokenizer":
    """open_clip's vocabulary, which takes a tenth of a second to read; not to be changed."""
    from open_clip.tokenizer import SimpleTokenizer  # slow, as models.text explains

    return SimpleTokenizer()


class Tokenizer:
    """Captions -> the token ids that transformers' CLIPTokenizer returns.

    Args:
        context_length: L, tokens per caption, including start and end.
        folder: folder of a published tokenizer, with ``tokenizer.json`` or with ``vocab.json``
            and ``merges.txt``; None for open_clip's vocabulary, which is CLIP's.

    Raises:
        FileNotFoundError: if the folder lacks these files.
        ValueError: if they do not define a tokenizer.
    """

    def __init__(self, *, context_length: int = 77, folder: str | None = None) -> None:
        self.context_length = context_length
        self.bpe = copy.copy(_open_clip_tokenizer())
        self.bpe.clean_fn = _clean
        pad, added = END, [START, END]
        if folder is None:  # as the published files name these two
            self.bpe.encoder = self.bpe.encoder | {
                START: self.bpe.sot_token_id,
                END: self.bpe.eot_token_id,
            }
        else:
            vocabulary, merges, added = _read_folder(Path(folder))
            self.bpe.encoder = vocabulary
            self.bpe.bpe_ranks = {pair: rank for rank, pair in enumerate(merges)}
            self.bpe.decoder = {i: token for token, i in vocabulary.items()}
            pad = _pad_token(Path(folder)) or END
        added = [token for token in added if token not in (START, END)]
        self._unsplit = {token: token for token in added}
        words = "|".join([*(re.escape(token) for token in added), WORDS])
        special = f"{re.escape(START)}|{re.escape(END)}"
        self.bpe.pat = re.compile(words)
        self._special = re.compile(f"({special})")
        self._vocabulary = re.compile(f"{special}|{words}")
        self._decoder = self.bpe.decoder
        self.set_words([])
        self.start, self.end = self.bpe.encoder[START], self.bpe.encoder[END]
        self.pad = self.bpe.encoder[pad]
        self.size = 1 + max(self.bpe.encoder.values())

    def set_words(self, words: Sequence[tuple[str, Sequence[int]]]) -> None:
        """Encode new words, in upper or lower case, as these ids; earlier new words are removed.

        Raises:
            ValueError: if a word appears twice, is a token of the vocabulary, or has white space;
                then nothing changes.
        """
        new: dict[str, list[int]] = {}
        for word, ids in words:
            if not word or WHITE_SPACE.search(word):
                raise ValueError(f"{word!r} is not one word; remove its white space")
            if _clean(word) in new:
                raise ValueError(f"the word {word!r} appears twice; remove one of them")
            if self._is_token(word):
                raise ValueError(
                    f"the word {word!r} is a token of the vocabulary already; use another one, "
                    f"such as <{word}>"
                )
            new[_clean(word)] = list(ids)
        # the longest first, and not the start of a longer word of letters
        by_length = sorted(new, key=len, reverse=True)
        patterns = [re.escape(word) + r"(?!\p{L})" * word[-1].isalnum() for word in by_length]
        self._words = re.compile("|".join([*patterns, self._vocabulary.pattern]))
        self._new_ids = new
        self._forget()
        shown = {i: "" for ids in new.values() for i in ids}
        shown |= {ids[-1]: self._bytes(word) for word, ids in new.items()}
        self.bpe.decoder = ChainMap(shown, self._decoder)

    def _is_token(self, word: str) -> bool:
        """Whether the vocabulary has a word as one token."""
        parts = self._vocabulary.findall(_clean(word))
        return len(parts) == 1 and len(self.bpe.encode(parts[0])) == 1

    def _bytes(self, word: str) -> str:
        """A word in the characters that the vocabulary has for bytes."""
        return "".join(self.bpe.byte_encoder[byte] for byte in word.encode()) + "</w>"

    def has_word(self, word: str, caption: str) -> bool:
        """Whether a caption has a new word, before the length at which it is truncated."""
        return self._new_ids[_clean(word)][-1] in self([caption])[0]

    def matching(self, pattern: str) -> list[int]:
        """The tokens that are whole words and match a pattern such as ``*cat*`` (``fnmatch``)."""
        words = (i for i, token in self._decoder.items() if token.endswith("</w>"))
        return sorted(i for i in words if fnmatchcase(self.decode([i]), pattern.lower()))

    def encode(self, caption: str) -> list[int]:
        """All tokens of a caption, without the start and end tokens that ``__call__`` adds."""
        ids: list[int] = []
        for piece in self._special.split(caption):  # before lower-casing, as transformers does
            if self._special.fullmatch(piece):
                ids.append(self.bpe.encoder[piece])
            else:  # an upper-case special token is text, but a word of its own
                for word in self._words.findall(_clean(piece)):
                    ids += self._encode_word(word)
        return ids

    def _encode_word(self, word: str) -> list[int]:
        """The tokens of a word, kept for when it recurs: open_clip takes 0.02 ms for each word."""
        if word not in self._ids_by_word:
            if len(self._ids_by_word) >= CACHED_WORDS:
                self._forget()
            self._ids_by_word[word] = self.bpe.encode(word)
        return self._ids_by_word[word]

    def _forget(self) -> None:
        """Empty the caches of words, this one and open_clip's, which is not bounded."""
        self._ids_by_word: dict[str, list[int]] = dict(self._new_ids)
        self.bpe.cache = self._unsplit.copy()

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids -> text."""
        return self.bpe.decode(ids).strip()

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions -> ids, (B, L) int64, and mask, (B, L) bool, false for padding.

        Captions that are too long are truncated but keep their end token.
        """
        ids = torch.full((len(captions), self.context_length), self.pad)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, caption in enumerate(captions):
            caption_ids = [self.start, *self.encode(caption)[: self.context_length - 2], self.end]
            ids[row, : len(caption_ids)] = torch.tensor(caption_ids)
            mask[row, : len(caption_ids)] = True
        return ids, mask


def _clean(text: str) -> str:
    """Normalize as CLIPTokenizer does; open_clip would also repair mojibake and HTML entities.

    Characters are lower-cased one by one: ``str.lower`` of a word may yield a final sigma.
    """
    text = WHITE_SPACE.sub(" ", unicodedata.normalize("NFC", text))
    return text.lower() if text.isascii() else "".join(character.lower() for character in text)


Vocabulary = tuple[dict[str, int], list[tuple[str, str]], list[str]]


def _read_folder(folder: Path) -> Vocabulary:
    """Token -> id, merges (best first), and tokens that are never split (longest first)."""
    with contents_of(folder, "use another tokenizer"):
        vocabulary, merges = _read(folder)
        added_file = folder / "added_tokens.json"
        added: dict[str, int] = _json(added_file) if added_file.is_file() else {}
        vocabulary |= added
        if not all(isinstance(i, int) for i in vocabulary.values()) or START not in vocabulary:
            raise ValueError(
                f"{folder} is not a tokenizer: the vocabulary lacks {START} or has an id that is "
                "not an integer; use another tokenizer"
            )
        unsplit = {START, END, *added, *_added_tokens(folder)}
        return vocabulary, merges, sorted(unsplit, key=len, reverse=True)


def _added_tokens(folder: Path) -> list[str]:
    path = folder / FILES[0]
    return [token["content"] for token in _json(path)["added_tokens"]] if path.is_file() else []


def _read(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id, and merges (best first)."""
    combined, vocabulary, merges = (folder / name for name in FILES[:3])
    if combined.is_file():
        content = _json(combined)
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
        pairs = content["model"]["merges"]
        split = [pair.split(" ") if isinstance(pair, str) else pair for pair in pairs]
        return {**content["model"]["vocab"], **added}, [(first, second) for first, second in split]
    if not (vocabulary.is_file() and merges.is_file()):
        raise FileNotFoundError(
            f"{folder} is not a tokenizer: it has neither {combined.name} nor "
            f"{vocabulary.name} with {merges.name}"
        )
    with contents_of(merges):
        lines = merges.read_text(encoding="utf-8").splitlines()
        split = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        return _json(vocabulary), [(first, second) for first, second in split]


def _pad_token(folder: Path) -> str | None:
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        token = _json(folder / name).get("pad_token") if (folder / name).is_file() else None
        if token is not None:
            return str(token["content"]) if isinstance(token, dict) else str(token)
    return None


def _json(path: Path) -> dict[str, Any]:
    with contents_of(path, "use another tokenizer"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object; use another tokenizer")
        return content


def write_vocabulary(folder: Path, context_length: int = 77) -> None:
    """Write open_clip's vocabulary in the published file format.

    Raises:
        OSError: if the folder cannot be written.
    """
    tokenizer = Tokenizer()
    shipped = _open_clip_tokenizer()
    shipped_special = {shipped.sot_token_id: START, shipped.eot_token_id: END}
    vocabulary = {shipped_special.get(i, token): i for i, token in shipped.decoder.items()}
    merges = [" ".join(pair) for pair in tokenizer.bpe.bpe_ranks]
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    config = {
        **special, "model_max_length": context_length, "tokenizer_class": "CLIPTokenizer",
        "do_lower_case": True,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
