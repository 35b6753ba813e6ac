"""Image files: one conversion to RGB for training, evaluation and editing, and the PNG writer."""

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
"""File suffixes that are treated as images."""

# Some of PIL's other formats start external programs, for example EPS.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are decoded, whatever the file's suffix."""

EXIF_ORIENTATION = 0x0112


def upright_size(data: bytes | str) -> tuple[int, int] | None:
    """(width, height) of an image after EXIF rotation, from bytes or a path; None if unreadable."""
    try:
        with Image.open(
            io.BytesIO(data) if isinstance(data, bytes) else data, formats=IMAGE_FORMATS
        ) as img:
            rotated = img.getexif().get(EXIF_ORIENTATION, 1) >= 5
            return (img.height, img.width) if rotated else img.size
    except Exception:  # PIL raises various types for damaged headers
        return None


def decode_image(data: bytes, cover: tuple[int, int] | None = None) -> np.ndarray:
    """Decode an image to upright RGB, with transparency composited on white.

    Args:
        data: the encoded image; of an animation, the first frame is decoded.
        cover: (height, width) that the result must cover: a JPEG at least twice as large is
            decoded at 1/2, 1/4 or 1/8 of its size by a reduced inverse DCT.

    Returns:
        (H, W, 3) uint8.

    Raises:
        OSError: if the format is unknown, the data are damaged or truncated, or the image has more
            pixels than PIL's limit of 179 million.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of large images below its limit
            img: Image.Image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
            orientation = img.getexif().get(EXIF_ORIENTATION, 1)
            if cover is not None:
                _draft(img, cover, rotated=orientation >= 5)
            if (plain := _plain_jpeg(img, data, orientation)) is not None:
                return plain
            return np.asarray(to_rgb(img))
    except OSError:
        raise
    except Exception as error:  # PIL raises various types for damaged files
        raise OSError(str(error) or type(error).__name__) from error


def _draft(img: Image.Image, cover: tuple[int, int], *, rotated: bool) -> None:
    width, height = img.size
    cover_height, cover_width = reversed(cover) if rotated else cover
    scale = max(cover_height / height, cover_width / width)
    img.draft(None, (max(1, round(width * scale)), max(1, round(height * scale))))


def _plain_jpeg(img: Image.Image, data: bytes, orientation: int) -> np.ndarray | None:
    """Decode an ordinary JPEG with simplejpeg, 1.5 times as fast as PIL; None for other images."""
    size = img.size
    if img.format != "JPEG" or img.mode not in ("RGB", "L") or orientation != 1:
        return None
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    if size != (width, height):  # a reduced size was requested
        return None
    try:
        return simplejpeg.decode_jpeg(data)
    except ValueError:  # PIL is more lenient and has better error messages
        return None


def to_rgb(img: Image.Image) -> Image.Image:
    """An upright 8-bit RGB image, with transparency composited on white."""
    img = ImageOps.exif_transpose(img)
    if img.mode.startswith("I"):
        # 16-bit gray: PIL's conversion to 8 bits clips at 255 instead of scaling.
        img = Image.fromarray((np.asarray(img).astype(np.float64) / 257).round().astype(np.uint8))
    if img.has_transparency_data:
        img = img.convert("RGBA")
        white = Image.new("RGBA", img.size, "white")
        img = Image.alpha_composite(white, img)
    return img.convert("RGB")


def to_float(pixels: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float32 in [0, 1] on the same device, with the same bits on all of them.

    The divisor is a tensor, because CUDA multiplies by the rounded reciprocal of a Python number.
    """
    return pixels.float().div_(torch.full((), 255.0, device=pixels.device))


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> an RGB image, rounded to 8 bits."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def write_png(path: Path, image: Tensor, metadata: dict) -> None:
    """Atomically write (3, H, W) in [0, 1] as PNG with ``metadata`` as text metadata.

    Raises:
        OSError: if it cannot be written; the message names the path.
    """
    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    with atomic_write(path) as temporary:
        to_pil(image).save(temporary, format="PNG", pnginfo=info)
