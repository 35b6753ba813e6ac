"""A grid of images with labels and captions, as one image."""

import unicodedata
from functools import lru_cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from wuerstchen_pl.io.images import to_pil

FONT_SIZE = 10
LINE_HEIGHT = 16
CAPTION_LINES = 2
GAP = 2
_NO_CHARACTER = "\U0010ffff"


def render_grid(columns: dict[str, Tensor], captions: list[str]) -> Image.Image:
    """One image with a labeled column per batch of images, and a caption under each row.

    Args:
        columns: label -> (B, 3, H, W) in [0, 1]; all of the same shape.
        captions: B captions; long ones are cut.
    """
    font = _font()
    first = next(iter(columns.values()))
    _, _, height, width = first.shape
    column_width = max(width, *(int(font.getlength(label)) + 6 for label in columns)) + GAP
    grid_width = column_width * len(columns)
    texts = [wrap(drawable(caption), grid_width - 4, CAPTION_LINES) for caption in captions]
    row_height = height + GAP + LINE_HEIGHT * max(len(lines) for lines in texts)
    canvas = Image.new("RGB", (grid_width, LINE_HEIGHT + row_height * len(captions)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (label, images) in enumerate(columns.items()):
        draw.text((i * column_width + 2, 1), label, fill="black", font=font)
        for j, image in enumerate(images):
            canvas.paste(to_pil(image), (i * column_width, LINE_HEIGHT + j * row_height))
    for j, lines in enumerate(texts):
        top = LINE_HEIGHT + j * row_height + height
        for number, line in enumerate(lines):
            draw.text((2, top + number * LINE_HEIGHT), line, fill="black", font=font)
    return canvas


def drawable(text: str) -> str:
    """``text`` in one line, with ``?`` for each character that the font does not have."""
    composed = unicodedata.normalize("NFC", " ".join(text.split()))
    return "".join(c if _has_glyph(c) else "?" for c in composed)


def wrap(text: str, width: int, max_lines: int) -> list[str]:
    """``text`` in lines of at most ``width`` pixels; what does not fit ends with ``...``."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if _font().getlength(longer) <= width:
            lines[-1] = longer
        elif lines[-1]:
            lines.append(word)
        else:
            lines[-1] = word
    cut = lines[:max_lines]
    if len(lines) > max_lines:
        cut[-1] += "..."
    return [_shortened(line, width) for line in cut]


def _shortened(line: str, width: int) -> str:
    """A line of at most ``width`` pixels, which ends with ``...`` if it is cut."""
    length = len(line)
    while length and _font().getlength(line) > width:
        length -= 1
        line = f"{line[:length].rstrip('.')}..."
    return line


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib; Pillow's own font has only ASCII."""
    path = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
    return ImageFont.truetype(str(path), size=FONT_SIZE)


@lru_cache(maxsize=4096)
def _has_glyph(character: str) -> bool:
    """Whether the font draws something else than the box of an unknown character."""
    return character == " " or _pixels(character) not in (_pixels(_NO_CHARACTER), b"")


@lru_cache(maxsize=4096)
def _pixels(character: str) -> bytes:
    return bytes(_font().getmask(character))
