"""A folder of images with their prompts, if known."""

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wuerstchen_pl.io.image_files import (
    GRID,
    IMAGE_SUFFIXES,
    OTHER_SUFFIXES,
    is_hidden,
    split_suffix,
)
from wuerstchen_pl.io.images import decode_image, upright_size
from wuerstchen_pl.plural import plural

logger = logging.getLogger(__name__)

MANIFEST = "images.json"
"""File in the folder that records how its images were generated."""


class ImageFolder:
    """Images in natural order of their file names: 2.png before 10.png.

    Args:
        path: the folder.
        key: config key that named it, for error messages.
        prompts: of the images, in their order; None reads them from ``images.json``, if present.

    Raises:
        FileNotFoundError: if there is no image.
        ValueError: if the numbers of prompts and images differ.
    """

    def __init__(
        self, path: Path, *, key: str = "images", prompts: Sequence[str] | None = None
    ) -> None:
        self.path, self.key = path, key
        files = sorted(path.iterdir(), key=_by_numbers) if path.is_dir() else []
        reasons = {file: _reason_to_skip(file) for file in files}
        self.paths = [file for file in files if reasons[file] is None]
        skipped = Counter(reason for reason in reasons.values() if reason)
        unused = ", ".join(f"{number} x {reason}" for reason, number in sorted(skipped.items()))
        if not self.paths:
            skipped_files = f" ({unused})" if unused else ""
            raise FileNotFoundError(
                f"{key}={path} contains no images{skipped_files}; use a folder of images"
            )
        if unused:
            number = plural(len(self.paths), "image")
            logger.info("%s=%s: %s; not used: %s", key, path, number, unused)
        if prompts is None and (path / MANIFEST).is_file():
            prompts = _prompts_of(path / MANIFEST)
        self.prompts = None if prompts is None else list(prompts)
        if self.prompts is not None and len(self.prompts) != len(self.paths):
            raise ValueError(
                f"{key}={path} contains {plural(len(self.paths), 'image')} for "
                f"{plural(len(self.prompts), 'prompt')}; provide one image per prompt"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield images (3, H, W) uint8."""
        for index in range(len(self)):
            yield torch.from_numpy(self._pixels(index).copy()).permute(2, 0, 1)

    def image(self, index: int) -> Image.Image:
        """One RGB image, decoded as in training.

        Raises:
            ValueError: if it is damaged.
        """
        return Image.fromarray(self._pixels(index))

    def _pixels(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        path = self.paths[index]
        try:
            return decode_image(path.read_bytes())
        except OSError as error:
            raise _damaged(path, error) from error

    def sizes(self) -> list[tuple[int, int]]:
        """The distinct (height, width) in pixels."""
        sizes = set()
        for path in self.paths:
            if (size := upright_size(str(path))) is None:
                raise _damaged(path, "its size cannot be read")
            sizes.add((size[1], size[0]))
        return sorted(sizes)

    def fingerprint(self) -> str:
        """A hash of file names, sizes and modification times."""
        stats = ((path.name, path.stat()) for path in self.paths)
        text = "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)
        return hashlib.sha256(f"{self.path.resolve()}\n{text}".encode()).hexdigest()


def _reason_to_skip(path: Path) -> str | None:
    """Why a file is not used; "" for one that is not an image, None for an image."""
    suffix = split_suffix(path.name)[1]
    if path.is_dir():
        return "subfolder"
    if suffix in OTHER_SUFFIXES:
        return "unsupported image format"
    if suffix not in IMAGE_SUFFIXES:
        return ""
    if is_hidden(path.name):
        return "hidden file"
    return "grid of samples" if path.name == GRID else None


def _by_numbers(path: Path) -> list[tuple[int, str]]:
    """Sort key of natural order: 2.png before 10.png."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _damaged(path: Path, reason: object) -> ValueError:
    return ValueError(
        f"{path} is damaged ({reason}); replace it, or, if it was generated here, remove it and "
        "run the command again, which generates only missing images"
    )


def _prompts_of(path: Path) -> list[str]:
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))["prompts"]
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError("a prompt is not a string")
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); set prompts= to a file of prompts"
        ) from error
    return prompts


def check_same_prompts(prompts: Sequence[str], folder: ImageFolder) -> None:
    """Check that a folder has an image for each of the prompts, as far as its own are known.

    Raises:
        ValueError: naming both numbers, or the first prompt that differs.
    """
    if len(prompts) != len(folder):
        raise ValueError(
            f"{folder.key}={folder.path} contains {plural(len(folder), 'image')}, but there "
            f"are {len(prompts)} to compare with; generate both for the same prompts"
        )
    pairs = zip(prompts, folder.prompts or prompts, strict=True)
    if mismatch := next((pair for pair in pairs if pair[0] != pair[1]), None):
        raise ValueError(
            f"{folder.key}={folder.path} was generated for {mismatch[1]!r}, but the images to "
            f"compare with for {mismatch[0]!r}; generate both for the same prompts"
        )
