"""What the fields of a sample may hold: captions, what metadata say, and the head of a picture."""

import io
import math
from collections.abc import Mapping
from typing import Any

from PIL import Image

PICTURE_TYPES = ("jpg", "jpeg", "png", "webp")
"""Suffixes of what is taken for a picture."""

# PIL's other formats include some that start programs, as EPS does.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What a picture may be, whatever its suffix."""

FACTS = ("pwatermark", "punsafe", "aesthetic", "AESTHETIC_SCORE")
"""What LAION's metadata say of a picture, and filters ask for."""

EXIF_ORIENTATION = 0x0112


def upright_size(data: bytes | str) -> tuple[int, int] | None:
    """Return (width, height) of a picture, given as bytes or as a path, or None."""
    try:
        with Image.open(
            io.BytesIO(data) if isinstance(data, bytes) else data, formats=FORMATS
        ) as img:
            turned = img.getexif().get(EXIF_ORIENTATION, 1) >= 5
            return (img.height, img.width) if turned else img.size
    except Exception:  # whatever a damaged header makes one of PIL's decoders stumble over
        return None


def captions_of(value: Any) -> tuple[str, ...]:
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


def facts_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Return what a row of metadata says of a picture, as far as filters can compare it."""
    found = {}
    for name in FACTS:
        value = row.get(name)
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            continue
        if math.isfinite(number):
            found[name] = number
    return found
