"""Image files: one conversion to RGB for training, evaluation and editing, and the PNG writer."""

import io
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from wuerstchen_pl.io.atomic import atomic_write
from wuerstchen_pl.io.image_files import IMAGE_FORMATS

_ORIENTATION = 0x0112  # the EXIF tag
_PNG_SIGNATURE, _PNG_TEXT = 8, (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
# PIL's warnings name no file, and what cannot be decoded is reported with its file. Not by
# ``catch_warnings``, which is not safe in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


def upright_size(data: bytes | str) -> tuple[int, int] | None:
    """(width, height) of an image after EXIF rotation, from bytes or a path; None if unreadable."""
    try:
        with _open(io.BytesIO(data) if isinstance(data, bytes) else data) as img:
            return (img.height, img.width) if _orientation(img) >= 5 else img.size
    except Exception:  # PIL raises various types for damaged headers
        return None


def decode_image(data: bytes, cover: tuple[int, int] | None = None) -> np.ndarray:
    """Decode an image to upright RGB, with transparency composited on white.

    Args:
        data: the encoded image; of an animation, the first frame is decoded.
        cover: (height, width) that the result must cover: an image at least twice as large is
            reduced by a power of 2, a JPEG by a reduced inverse DCT, others by averaging.

    Returns:
        (H, W, 3) uint8.

    Raises:
        OSError: if the format is unknown, the data are damaged or truncated, the range of the
            pixels is unknown, or the image has more pixels than PIL's limit of 179 million.
    """
    with _as_os_error():
        img = _open(io.BytesIO(data))
        orientation = _orientation(img)
        if cover is not None:
            _draft(img, cover, rotated=orientation >= 5)
        if (plain := _plain_jpeg(img, data, orientation)) is not None:
            return plain
        return np.asarray(_reduced(to_rgb(img), cover))


def decode_gray(data: bytes) -> np.ndarray:
    """Decode a mask to upright gray, (H, W) uint8.

    Raises:
        OSError: see ``decode_image``.
    """
    with _as_os_error():
        return np.asarray(to_rgb(_open(io.BytesIO(data))).convert("L"))


def has_alpha(data: bytes) -> bool:
    """Whether an image has transparency, from its header.

    Raises:
        OSError: the header is damaged.
    """
    with _as_os_error():
        return _open(io.BytesIO(data)).has_transparency_data


def decode_alpha(data: bytes) -> np.ndarray | None:
    """The upright alpha channel of an image, (H, W) uint8; None if it has no transparency.

    Raises:
        OSError: see ``decode_image``.
    """
    with _as_os_error():
        if not has_alpha(data):
            return None
        img = ImageOps.exif_transpose(_open(io.BytesIO(data)))
        return np.asarray(img.convert("RGBA").getchannel("A"))


@contextmanager
def _as_os_error() -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # PIL raises various types for damaged files
        raise OSError(str(error) or type(error).__name__) from error


def _open(source: io.BytesIO | str) -> ImageFile:
    return Image.open(source, formats=IMAGE_FORMATS)


def _orientation(img: ImageFile) -> int:
    """The EXIF orientation; 1 (upright) if it is missing or invalid."""
    # PIL would decode a whole PNG without EXIF to find it after the pixels
    is_header_enough = img.format == "PNG" and not _has_text_after_pixels(img)
    exif: Any = Image.Image.getexif(img) if is_header_enough else img.getexif()
    value = exif.get(_ORIENTATION)
    return value if value in range(1, 9) else 1


def _has_text_after_pixels(img: ImageFile) -> bool:
    """Whether a PNG has EXIF or text chunks after its pixels.

    Raises:
        OSError: it is truncated.
    """
    assert img.fp is not None
    position, after_pixels = img.fp.tell(), False
    img.fp.seek(_PNG_SIGNATURE)
    try:
        while len(header := img.fp.read(8)) == 8 and header[4:] != b"IEND":
            after_pixels |= header[4:] == b"IDAT"
            if after_pixels and header[4:] in _PNG_TEXT:
                return True
            img.fp.seek(int.from_bytes(header[:4]) + 4, os.SEEK_CUR)  # and the checksum
    finally:
        img.fp.seek(position)
    if len(header) < 8:
        raise OSError("the file is truncated")
    return False


def _draft(img: Image.Image, cover: tuple[int, int], *, rotated: bool) -> None:
    width, height = img.size
    cover_height, cover_width = reversed(cover) if rotated else cover
    scale = max(cover_height / height, cover_width / width)
    img.draft(None, (max(1, round(width * scale)), max(1, round(height * scale))))


def _reduced(img: Image.Image, cover: tuple[int, int] | None) -> Image.Image:
    """An image averaged over squares, as large as possible while it still covers ``cover``."""
    factor = 1
    while cover and img.height >= 2 * factor * cover[0] and img.width >= 2 * factor * cover[1]:
        factor *= 2
    return img if factor == 1 else img.reduce(factor)


def _plain_jpeg(img: Image.Image, data: bytes, orientation: int) -> np.ndarray | None:
    """Decode an ordinary JPEG with simplejpeg, 1.5 times as fast as PIL; None for other images."""
    size = img.size
    if img.format != "JPEG" or img.mode not in ("RGB", "L") or orientation != 1:
        return None
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        # PIL's size is smaller if a reduced one was requested
        return simplejpeg.decode_jpeg(data) if size == (width, height) else None
    except ValueError:  # PIL is more lenient and has better error messages
        return None


def to_rgb(img: Image.Image) -> Image.Image:
    """An upright 8-bit RGB image, with transparency composited on white.

    Raises:
        OSError: if the pixels are neither 8 nor 16 bits.
    """
    img = ImageOps.exif_transpose(img)
    if img.mode.startswith(("I", "F")):
        img = _gray_to_8_bits(img)
    if img.has_transparency_data:
        img = img.convert("RGBA")
        white = Image.new("RGBA", img.size, "white")
        img = Image.alpha_composite(white, img)
    return img.convert("RGB")


def _gray_to_8_bits(img: Image.Image) -> Image.Image:
    """16-bit gray to 8 bits; PIL's conversion clips at 255 instead of scaling.

    Raises:
        OSError: if the range of the pixels is unknown.
    """
    pixels = np.asarray(img)
    if img.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
        raise OSError("pixels of 32 bits have no known range; convert the image to 8 or 16 bits")
    return Image.fromarray((pixels.astype(np.float64) / 257).round().astype(np.uint8))


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
