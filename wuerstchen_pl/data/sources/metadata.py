"""What the fields of a sample may hold: captions, what metadata say, and the head of an image."""

import math
from collections.abc import Mapping
from typing import Any

SCORE_COLUMNS = ("pwatermark", "punsafe", "aesthetic", "AESTHETIC_SCORE")
"""What LAION's metadata say of an image, and filters ask for."""


def parse_captions(value: Any) -> tuple[str, ...]:
    """Return the captions that a field holds: one, or a list to draw from; () if none."""
    return tuple(text.strip() for text in _texts(value) if _is_unicode(text))


def has_text(value: Any) -> bool:
    """Whether a field holds a text, even one with halves of characters, or bytes that are none."""
    return bool(_texts(value))


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list | tuple) else [value]
    return [text for text in values if isinstance(text, str) and text.strip()]


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_scores(row: Mapping[str, Any]) -> dict[str, float]:
    """Return what a row of metadata says of an image, as far as filters can compare it."""
    found = {}
    for name in SCORE_COLUMNS:
        value = row.get(name)
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            continue
        if math.isfinite(number):
            found[name] = number
    return found
