"""Prompt files: plain text, COCO captions, Localized Narratives and PartiPrompts."""

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path

from wuerstchen_pl.io.text_files import decode_text


def read_prompts(path: str) -> list[str]:
    """The prompts of a file, whose format follows from its suffix.

    ``.json``: COCO captions, the caption with the lowest id of each image, ordered by image id.
    ``.jsonl``: Localized Narratives. ``.tsv``: PartiPrompts. Any other: text, one prompt per line.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file does not match its format, or contains no prompts.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"prompts={path} is not a file; use a prompt file")
    try:
        text = decode_text(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"prompts={path} is not UTF-8 text: {error}") from error
    try:
        prompts = [" ".join(line.split()) for line in READERS.get(file.suffix, _lines)(text)]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"prompts={path} cannot be read as {KINDS[file.suffix]}: {error!r}"
        ) from error
    if not (prompts := [prompt for prompt in prompts if prompt]):
        raise ValueError(f"prompts={path} contains no prompts; write one per line")
    return prompts


def subsample(prompts: list[str], num_prompts: int | None, seed: int) -> list[str]:
    """A random subset of ``num_prompts`` prompts in their original order; None returns all."""
    if num_prompts is None or num_prompts >= len(prompts):
        return prompts
    chosen = sorted(random.Random(seed).sample(range(len(prompts)), num_prompts))
    return [prompts[i] for i in chosen]


def _coco(text: str) -> list[str]:
    first: dict[int, tuple[int, str]] = {}
    for annotation in json.loads(text)["annotations"]:
        image, caption = annotation["image_id"], (annotation["id"], annotation["caption"])
        first[image] = min(first.get(image, caption), caption)
    return [first[image][1] for image in sorted(first)]


def _narratives(text: str) -> list[str]:
    return [json.loads(line)["caption"] for line in text.split("\n") if line.strip()]


def _parti(text: str) -> list[str]:
    rows = csv.DictReader(text.split("\n"), delimiter="\t", quoting=csv.QUOTE_NONE)
    return [row["Prompt"] for row in rows]


def _lines(text: str) -> list[str]:
    return text.split("\n")


READERS: dict[str, Callable[[str], list[str]]] = {
    ".json": _coco, ".jsonl": _narratives, ".tsv": _parti
}  # fmt: skip
KINDS = {
    ".json": "COCO captions", ".jsonl": "Localized Narratives", ".tsv": "PartiPrompts"
}  # fmt: skip
