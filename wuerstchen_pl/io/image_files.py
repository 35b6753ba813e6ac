"""Which files are images: the one list of formats, and the rules for file names."""

import re

_SUFFIXES = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "PNG": ("png",),
    "WEBP": ("webp",),
    "TIFF": ("tif", "tiff"),
    "BMP": ("bmp",),
    "GIF": ("gif",),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
}
IMAGE_FORMATS = tuple(_SUFFIXES)
"""Formats that are decoded, whatever the file's suffix. Pillow starts programs for some others."""
IMAGE_SUFFIXES = tuple(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)
"""Suffixes of image files in lower case, preferred formats first."""
OTHER_SUFFIXES = (
    *("apng", "avif", "heic", "heif", "ico", "j2k", "jp2", "jxl", "psd", "svg"),
    *("exr", "hdr", "tga"),
    *("arw", "cr2", "cr3", "dng", "nef", "orf", "raf", "rw2"),  # raw photographs
)
"""Suffixes of images that cannot be decoded, in lower case; they are reported, not overlooked."""
MASK_SUFFIX = ".mask.png"
"""Added to the name of an image without its suffix, it is the name of the image's mask."""
CONTROL_SUFFIX = ".control.png"
"""Likewise, of the image's control image, for a ControlNet."""
GRID = "grid.png"
"""The overview of the images that ``sample`` writes; it is not one of them."""


def split_suffix(name: str) -> tuple[str, str]:
    """A file name without its suffix, and the suffix in lower case without its dot."""
    stem, dot, suffix = name.rpartition(".")
    return (stem, suffix.lower()) if dot and "/" not in suffix else (name, "")


def is_hidden(name: str) -> bool:
    """Whether a file or one of its folders is hidden, such as macOS's ``._a.jpg``."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def slug(prompt: str) -> str:
    """A prompt as an ASCII part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:40].strip("-") or "prompt"
