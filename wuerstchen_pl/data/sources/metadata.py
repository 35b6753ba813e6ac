"""Parses captions and scores out of a sample's metadata fields."""

import math
from collections.abc import Mapping
from typing import Any

SCORE_COLUMNS = ("pwatermark", "punsafe", "aesthetic", "AESTHETIC_SCORE")
"""Score columns of LAION's metadata, for filters."""


def parse_captions(value: Any) -> tuple[str, ...]:
    """The valid captions of a field, which is a string or a list of strings."""
    return tuple(text.strip() for text in _texts(value) if _is_unicode(text))


def has_text(value: Any) -> bool:
    """Whether a field contains text, even text that is not valid Unicode (lone surrogates)."""
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
    """The finite scores of a metadata row, by name."""
    scores = {}
    for name in SCORE_COLUMNS:
        value = row.get(name)
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            continue
        if math.isfinite(number):
            scores[name] = number
    return scores
