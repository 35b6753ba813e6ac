"""From the bytes of a picture to a crop of its bucket's size.

Chance is an argument: a crop is a function of two numbers in [0, 1). A picture is shrunk until it
just covers its bucket, so a crop moves along one axis only, by what its ratio and the bucket's
differ; a picture that fits exactly is always shown whole.
"""

import io
import math
import warnings
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from wuerstchen_pl.data.buckets import Size

Crop = Literal["random", "centre", "saliency"]
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

CENTRE = (0.5, 0.5)
_EXIF_ORIENTATION = 0x0112
_PROBE = 64  # pixels of the shorter side in which the salient part is looked for


def decode(data: bytes, cover: Size | None = None) -> Image.Image:
    """Decode a picture to upright RGB, 8 bits a channel, transparency shown on white.

    Args:
        data: the encoded picture; of an animation, its first frame.
        cover: (height, width) that it will be shrunk to cover: a JPEG is then decoded at the
            smallest of 1/1, 1/2, 1/4, 1/8 of its size that still covers, by libjpeg's own reduced
            cosine transform, at a fraction of the time.

    Raises:
        OSError: the bytes are not a picture that PIL knows, are cut short, or would unpack to more
            than PIL's limit of 179 million pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is large but below the limit is no one's fault
            img: Image.Image = Image.open(io.BytesIO(data))
            if cover is not None:
                _draft(img, cover)
            img = ImageOps.exif_transpose(img)
            return _to_rgb(img)
    except OSError:
        raise
    except Exception as error:  # whatever a damaged file makes one of PIL's decoders stumble over
        raise OSError(str(error) or type(error).__name__) from error


def _draft(img: Image.Image, cover: Size) -> None:
    width, height = img.size
    if img.getexif().get(_EXIF_ORIENTATION, 1) >= 5:
        cover = (cover[1], cover[0])
    scale = max(cover[0] / height, cover[1] / width)
    img.draft(None, (math.ceil(width * scale), math.ceil(height * scale)))


def _to_rgb(img: Image.Image) -> Image.Image:
    if img.mode.startswith("I"):
        # 16-bit grey: PIL's own conversion to 8 bits clips at 255 instead of scaling.
        img = Image.fromarray((np.asarray(img).astype(np.float64) / 257).round().astype(np.uint8))
    if img.has_transparency_data:
        img = img.convert("RGBA")
        white = Image.new("RGBA", img.size, "white")
        img = Image.alpha_composite(white, img)
    return img.convert("RGB")


def crop_box(img: Image.Image, size: Size, place: tuple[float, float]) -> Box:
    """Return the greatest part of a picture that has a size's ratio.

    Args:
        img: the picture.
        size: (height, width) of the crop to be.
        place: where from top to bottom and from left to right, in [0, 1]; CENTRE is the middle.
    """
    scale = min(img.height / size[0], img.width / size[1])
    height, width = size[0] * scale, size[1] * scale
    top, left = place[0] * (img.height - height), place[1] * (img.width - width)
    return left, top, left + width, top + height


def salient_place(img: Image.Image, size: Size) -> tuple[float, float]:
    """Return the place of the crop with the strongest edges, for `crop_box`."""
    scale = _PROBE / min(img.size)
    # a strip is probed no finer than 16 probes long
    probe_size = tuple(min(max(1, round(side * scale)), 16 * _PROBE) for side in img.size)
    small = img.convert("L").resize(probe_size, Image.Resampling.BOX)  # type: ignore[arg-type]
    grey = np.asarray(small, dtype=np.float64)
    edges = np.hypot(*np.gradient(grey)) if min(grey.shape) > 1 else np.ones_like(grey)
    left, top, right, bottom = crop_box(small, size, (0.0, 0.0))
    return _best_start(edges.sum(1), bottom - top), _best_start(edges.sum(0), right - left)


def _best_start(profile: np.ndarray, length: float) -> float:
    """Where a window of `length` over a profile should begin, as a share of its freedom."""
    width = max(1, min(len(profile), round(length)))
    sums = np.convolve(profile, np.ones(width), mode="valid")
    best = np.flatnonzero(sums >= sums.max() * (1 - 1e-9))
    # of equal ones the middle one, as in a picture without edges
    return 0.5 if len(sums) == 1 else float(best[len(best) // 2]) / (len(sums) - 1)


def resize(img: Image.Image, box: Box, size: Size) -> np.ndarray:
    """Resize a part of a picture to a size.

    Lanczos, because it keeps the fine edges that Stage A has to learn, and PIL's, because it widens
    its filter when it reduces (torch's bicubic without `antialias` does not, and aliases). Only the
    part is resized, so that a strip of 1 x 20,000 pixels does not become a large picture.

    Returns:
        (height, width, 3) uint8.
    """
    height, width = size
    if box == (0, 0, width, height) and img.size == (width, height):
        return np.asarray(img)
    # Reducing by whole numbers first costs a fraction and cannot be seen with a gap of 3.
    resized = img.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    return np.asarray(resized)
