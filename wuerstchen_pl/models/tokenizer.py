"""CLIP's tokenizer: open_clip's byte-pair encoding, with its own vocabulary or a published one."""

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import regex as re
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

# \p{White_Space}, not \s: Python also counts the separators 0x1c to 0x1f as white space
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\p{White_Space}\p{L}\p{N}]+"
START, END = "<|startoftext|>", "<|endoftext|>"
FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
"""What a folder of a published tokenizer may hold."""


class Tokenizer:
    """Captions -> token ids, as transformers' CLIPTokenizer gives them.

    Args:
        context_length: L, tokens per caption with start and end.
        folder: a published tokenizer's, with ``tokenizer.json`` or with ``vocab.json`` and
            ``merges.txt``; None takes the vocabulary that open_clip ships, which is CLIP's.

    Raises:
        FileNotFoundError: if the folder lacks them.
        ValueError: if they are not those of a tokenizer.
    """

    def __init__(self, *, context_length: int = 77, folder: str | None = None) -> None:
        self.context_length = context_length
        self.bpe = SimpleTokenizer()
        self.bpe.clean_fn = _clean
        pad, added = END, [START, END]
        if folder is None:  # the names that the published files give to these two
            self.bpe.encoder |= {START: self.bpe.sot_token_id, END: self.bpe.eot_token_id}
        else:
            vocabulary, merges, added = _read_folder(Path(folder))
            self.bpe.encoder = vocabulary
            self.bpe.bpe_ranks = {pair: rank for rank, pair in enumerate(merges)}
            self.bpe.decoder = {i: token for token, i in vocabulary.items()}
            pad = _pad_token(Path(folder)) or END
        added = [token for token in added if token not in (START, END)]
        self.bpe.cache = {token: token for token in added}
        words = "|".join([*(re.escape(token) for token in added), WORDS])
        special = f"{re.escape(START)}|{re.escape(END)}"
        self.bpe.pat = re.compile(words)
        self._special, self._words = re.compile(f"({special})"), re.compile(f"{special}|{words}")
        self.start, self.end = self.bpe.encoder[START], self.bpe.encoder[END]
        self.pad = self.bpe.encoder[pad]
        self.size = 1 + max(self.bpe.encoder.values())

    def encode(self, caption: str) -> list[int]:
        """All tokens of a caption, without the start and end that `__call__` adds."""
        ids: list[int] = []
        for piece in self._special.split(caption):  # before lower-casing, as transformers does
            if self._special.fullmatch(piece):
                ids.append(self.bpe.encoder[piece])
            else:  # a special token in capitals is text, but its ends separate words
                for word in self._words.findall(_clean(piece)):
                    ids += self.bpe.encode(word)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Tokens -> text."""
        return self.bpe.decode(ids).strip()

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions -> ids, (B, L) int64, and mask, (B, L) bool, false for padding.

        Captions that are too long are cut, and keep their end token.
        """
        ids = torch.full((len(captions), self.context_length), self.pad)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, caption in enumerate(captions):
            kept = [self.start, *self.encode(caption)[: self.context_length - 2], self.end]
            ids[row, : len(kept)] = torch.tensor(kept)
            mask[row, : len(kept)] = True
        return ids, mask


def _clean(text: str) -> str:
    """What CLIPTokenizer does; open_clip would also repair mojibake and HTML entities.

    Each character is lower-cased alone: Python's ``lower`` writes a Greek final sigma.
    """
    text = re.sub(r"\p{White_Space}+", " ", unicodedata.normalize("NFC", text))
    return "".join(character.lower() for character in text)


Vocabulary = tuple[dict[str, int], list[tuple[str, str]], list[str]]


def _read_folder(folder: Path) -> Vocabulary:
    """Ids by token, merges, best first, and the tokens that are taken whole, longest first."""
    try:
        vocabulary, merges = _read(folder)
        extra = folder / "added_tokens.json"
        more: dict[str, int] = _json(extra) if extra.is_file() else {}
        vocabulary |= more
        if not all(isinstance(i, int) for i in vocabulary.values()) or START not in vocabulary:
            raise ValueError(f"its vocabulary lacks {START}, or holds no ids")
        whole = {START, END, *more, *_added(folder)}
        return vocabulary, merges, sorted(whole, key=len, reverse=True)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder} is not a tokenizer: {error}") from error


def _added(folder: Path) -> list[str]:
    whole = folder / FILES[0]
    return [token["content"] for token in _json(whole)["added_tokens"]] if whole.is_file() else []


def _read(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges, best first."""
    whole, vocabulary, merges = (folder / name for name in FILES[:3])
    if whole.is_file():
        content = _json(whole)
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
        pairs = content["model"]["merges"]
        split = [pair.split(" ") if isinstance(pair, str) else pair for pair in pairs]
        return {**content["model"]["vocab"], **added}, [(first, second) for first, second in split]
    if not (vocabulary.is_file() and merges.is_file()):
        raise FileNotFoundError(
            f"{folder} is not a tokenizer: it has neither {whole.name} nor {vocabulary.name} with "
            f"{merges.name}"
        )
    lines = merges.read_text(encoding="utf-8").splitlines()
    split = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    return _json(vocabulary), [(first, second) for first, second in split]


def _pad_token(folder: Path) -> str | None:
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        token = _json(folder / name).get("pad_token") if (folder / name).is_file() else None
        if token is not None:
            return str(token["content"]) if isinstance(token, dict) else str(token)
    return None


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_vocabulary(folder: Path, context_length: int = 77) -> None:
    """Write the vocabulary that open_clip ships in the published form.

    Raises:
        OSError: if the folder cannot be written.
    """
    tokenizer = Tokenizer()
    shipped = SimpleTokenizer()
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
