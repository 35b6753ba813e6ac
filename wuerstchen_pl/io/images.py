"""Image files: one decoder for training, evaluation and editing, and one PNG writer."""

import io
import json
import warnings
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from wuerstchen_pl.io.atomic import atomic_write

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
"""Suffixes of what is taken for an image."""

# PIL's other formats include some that start programs, as EPS does.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What an image may be, whatever its suffix."""

EXIF_ORIENTATION = 0x0112


def upright_size(data: bytes | str) -> tuple[int, int] | None:
    """Return (width, height) of an image, given as bytes or as a path, or None."""
    try:
        with Image.open(
            io.BytesIO(data) if isinstance(data, bytes) else data, formats=IMAGE_FORMATS
        ) as img:
            turned = img.getexif().get(EXIF_ORIENTATION, 1) >= 5
            return (img.height, img.width) if turned else img.size
    except Exception:  # whatever a damaged header makes one of PIL's decoders stumble over
        return None


def decode_image(data: bytes, cover: tuple[int, int] | None = None) -> np.ndarray:
    """Decode an image to upright RGB, transparency shown on white.

    Args:
        data: the encoded image; of an animation, its first frame.
        cover: (height, width) that it will be shrunk to cover: a JPEG at least twice as large is
            decoded at 1/2, 1/4 or 1/8 of its size, by its own reduced cosine transform.

    Returns:
        (H, W, 3) uint8.

    Raises:
        OSError: the bytes are not an image that PIL knows, are cut short, or would unpack to more
            than PIL's limit of 179 million pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # an image that is large, but below the limit, needs no warning
            img: Image.Image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
            orientation = img.getexif().get(EXIF_ORIENTATION, 1)
            if cover is not None:
                _draft(img, cover, turned=orientation >= 5)
            if (plain := _plain_jpeg(img, data, orientation)) is not None:
                return plain
            return np.asarray(_to_rgb(ImageOps.exif_transpose(img)))
    except OSError:
        raise
    except Exception as error:  # whatever a damaged file makes one of PIL's decoders stumble over
        raise OSError(str(error) or type(error).__name__) from error


def _draft(img: Image.Image, cover: tuple[int, int], *, turned: bool) -> None:
    width, height = img.size
    high, wide = reversed(cover) if turned else cover
    scale = max(high / height, wide / width)
    img.draft(None, (max(1, round(width * scale)), max(1, round(height * scale))))


def _plain_jpeg(img: Image.Image, data: bytes, orientation: int) -> np.ndarray | None:
    """Decode the usual kind of JPEG with simplejpeg, half as fast again as PIL; None if another."""
    header = img.size
    if img.format != "JPEG" or img.mode not in ("RGB", "L") or orientation != 1:
        return None
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    if header != (width, height):  # it is to be decoded at a fraction of its size
        return None
    try:
        return simplejpeg.decode_jpeg(data)
    except ValueError:  # PIL is more lenient, and says what is wrong
        return None


def _to_rgb(img: Image.Image) -> Image.Image:
    if img.mode.startswith("I"):
        # 16-bit gray: PIL's own conversion to 8 bits clips at 255 instead of scaling.
        img = Image.fromarray((np.asarray(img).astype(np.float64) / 257).round().astype(np.uint8))
    if img.has_transparency_data:
        img = img.convert("RGBA")
        white = Image.new("RGBA", img.size, "white")
        img = Image.alpha_composite(white, img)
    return img.convert("RGB")


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> an RGB image, rounded to 8 bits."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def write_png(path: Path, image: Tensor, facts: dict) -> None:
    """Write (3, H, W) in [0, 1] as PNG with ``facts`` in its metadata; whole, or not at all.

    Raises:
        OSError: if it cannot be written, naming the path.
    """
    info = PngInfo()
    for key, value in facts.items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    with atomic_write(path) as temporary:
        to_pil(image).save(temporary, format="PNG", pnginfo=info)
