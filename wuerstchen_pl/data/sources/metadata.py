"""Parses captions and scores out of a sample's files, or the columns of its row."""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from wuerstchen_pl.data.sources.source import UnusableSampleError
from wuerstchen_pl.io.text_files import decode_text

NUMBER_COLUMNS = ("pwatermark", "punsafe", "aesthetic", "AESTHETIC_SCORE", "weight")
"""Columns of numbers: scores of LAION's metadata, for filters, and the weight of the loss."""


def parse_captions(value: Any) -> tuple[str, ...]:
    """The captions of a field, which is a string or a list of strings; blank ones are left out.

    White space, including line ends, becomes single spaces.

    Raises:
        UnusableSampleError: there are captions, but none is valid Unicode.
    """
    values = value if isinstance(value, list | tuple) else [value]
    texts = [" ".join(text.lstrip("\ufeff").split()) for text in values if isinstance(text, str)]
    captions = tuple(text for text in texts if text and _is_unicode(text))
    if any(texts) and not captions:
        raise UnusableSampleError("caption is not UTF-8")
    return captions


def file_captions(
    caption: bytes | None, metadata: Mapping[str, Any], *, by_line: bool = False
) -> tuple[str, ...]:
    """The captions of a sample in files: ``captions`` of its metadata, or else its caption file.

    Args:
        caption: content of the caption file, if there is one.
        metadata: its parsed metadata.
        by_line: whether each line of the caption file is a caption, instead of the whole file.

    Raises:
        UnusableSampleError: see ``parse_captions``.
    """
    with suppress(UnusableSampleError):
        if captions := parse_captions(metadata.get("captions")):
            return captions
    try:
        text = decode_text(caption or b"")
        return parse_captions(text.splitlines() if by_line else text)
    except ValueError as error:
        raise UnusableSampleError("caption is not UTF-8") from error


def parse_metadata(data: bytes | None) -> dict[str, Any]:
    """The content of a sample's JSON file; empty if there is none, or if it is damaged."""
    try:
        metadata = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _is_unicode(text: str) -> bool:
    """Whether a text has neither lone surrogates nor NUL characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def parse_numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a metadata row, by name.

    Raises:
        UnusableSampleError: the weight is below 0.
    """
    numbers = {}
    for name in NUMBER_COLUMNS:
        value = row.get(name)
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            continue
        if math.isfinite(number):
            numbers[name] = number
    if numbers.get("weight", 0) < 0:
        raise UnusableSampleError("negative weight")
    return numbers
