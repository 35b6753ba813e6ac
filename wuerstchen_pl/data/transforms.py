"""From the bytes of a picture to a crop of its bucket's size.

Chance is an argument: a crop is a function of two numbers in [0, 1), which are a function of
(seed, batch, sample). Neither the number of workers nor a restart changes it. A picture is shrunk
until it just covers its bucket, so it moves along one axis only, by what its ratio and the bucket's
differ; one that fits exactly is always shown whole.
"""

import hashlib
import io

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

CENTRE = (0.5, 0.5)


def decode(data: bytes) -> Image.Image:
    """Decode a picture to upright RGB, 8 bits a channel, transparency shown on white.

    Raises:
        OSError: the bytes are not a picture that PIL knows, or are cut short.
    """
    img: Image.Image = Image.open(io.BytesIO(data))
    img = ImageOps.exif_transpose(img)
    if img.mode.startswith("I"):
        # 16-bit grey: PIL's own conversion to 8 bits clips at 255 instead of scaling.
        img = Image.fromarray((np.asarray(img).astype(np.float64) / 257).round().astype(np.uint8))
    if img.has_transparency_data:
        img = img.convert("RGBA")
        white = Image.new("RGBA", img.size, "white")
        img = Image.alpha_composite(white, img)
    return img.convert("RGB")


def resize_to_cover(img: Image.Image, height: int, width: int) -> Tensor:
    """Resize so that the picture just covers height x width, keeping its ratio.

    Lanczos, because it keeps the fine edges that Stage A has to learn, and PIL's, because it widens
    its filter when it reduces (torch's bicubic without `antialias` does not, and aliases).

    Returns:
        (3, h, w) uint8 with h >= height, w >= width and at least one of them equal.
    """
    scale = max(height / img.height, width / img.width)
    size = (max(width, round(img.width * scale)), max(height, round(img.height * scale)))
    if size != img.size:
        # Reducing by whole numbers first costs a fraction and cannot be seen with a gap of 3.
        img = img.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    return torch.from_numpy(np.array(img)).permute(2, 0, 1).contiguous()


def crop(img: Tensor, height: int, width: int, place: tuple[float, float]) -> Tensor:
    """Cut height x width out of a picture.

    Args:
        img: (C, h, w) with h >= height and w >= width.
        height: of the crop in pixels.
        width: of the crop in pixels.
        place: where from top to bottom and from left to right, in [0, 1); CENTRE is the middle.

    Returns:
        (C, height, width), a view.
    """
    top = int(place[0] * (img.shape[1] - height + 1))
    left = int(place[1] * (img.shape[2] - width + 1))
    return img[:, top : top + height, left : left + width]


def crop_place(seed: int, batch: int, index: int) -> tuple[float, float]:
    """Draw the place of a crop, two independent numbers in [0, 1), from what it belongs to."""
    digest = hashlib.blake2b(f"{seed}/{batch}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4]) / 2**32, int.from_bytes(digest[4:]) / 2**32
