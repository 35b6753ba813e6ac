"""A folder of images, each with the prompt that it was drawn for, where that is known."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wuerstchen_pl.io.images import IMAGE_SUFFIXES, decode_image, upright_size

MANIFEST = "images.json"
"""What they were drawn from, beside them."""


class ImageFolder:
    """Images in the order of their names, numbers in these by their value.

    Args:
        path: of the folder.
        key: of the config that named it, for messages.
        prompts: of the images, in their order; None takes those that ``images.json`` has.

    Raises:
        FileNotFoundError: if there is no image.
        ValueError: if there are not as many prompts as images.
    """

    def __init__(
        self, path: Path, *, key: str = "images", prompts: Sequence[str] | None = None
    ) -> None:
        self.path, self.key = path, key
        there = sorted(path.iterdir(), key=_by_numbers) if path.is_dir() else []
        self.paths = [file for file in there if file.suffix[1:].lower() in IMAGE_SUFFIXES]
        if not self.paths:
            raise FileNotFoundError(f"{key}={path} holds no image; name a folder of them")
        if prompts is None and (path / MANIFEST).is_file():
            prompts = _prompts_of(path / MANIFEST)
        self.prompts = None if prompts is None else list(prompts)
        if self.prompts is not None and len(self.prompts) != len(self.paths):
            raise ValueError(
                f"{key}={path} holds {len(self.paths)} images, and there are "
                f"{len(self.prompts)} prompts; there must be an image for each"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Tensor]:
        """(3, H, W) uint8 each."""
        for number in range(len(self)):
            yield torch.from_numpy(self._pixels(number)).permute(2, 0, 1)

    def image(self, number: int) -> Image.Image:
        """One image, RGB, decoded as training decodes it.

        Raises:
            ValueError: if it is damaged.
        """
        return Image.fromarray(self._pixels(number))

    def _pixels(self, number: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        path = self.paths[number]
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
        """A hash of names, sizes and times: another one as soon as a file is changed."""
        stats = ((path.name, path.stat()) for path in self.paths)
        text = "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)
        return hashlib.sha256(f"{self.path.resolve()}\n{text}".encode()).hexdigest()


def _by_numbers(path: Path) -> list[tuple[int, str]]:
    """2.png before 10.png."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _damaged(path: Path, reason: object) -> ValueError:
    return ValueError(
        f"{path} is damaged ({reason}); remove it if it was generated here, and run the command "
        "again, which generates only what is missing; replace it otherwise"
    )


def _prompts_of(path: Path) -> list[str]:
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))["prompts"]
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError("a prompt is not text")
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); name the prompts with prompts=") from error
    return prompts


def check_same_number(number: int, theirs: ImageFolder) -> None:
    """Refuse a folder of another number of images than there are prompts.

    Raises:
        ValueError: naming both.
    """
    if number != len(theirs):
        raise ValueError(
            f"{theirs.key}={theirs.path} holds {len(theirs)} images, and there are {number} to "
            "compare with; draw both for the same prompts"
        )


def check_same_prompts(ours: ImageFolder, theirs: ImageFolder) -> None:
    """Refuse folders that were not drawn for the same prompts.

    Raises:
        ValueError: naming what differs.
    """
    check_same_number(len(ours), theirs)
    pairs = zip(ours.prompts or (), theirs.prompts or (), strict=False)
    if other := next((pair for pair in pairs if pair[0] != pair[1]), None):
        raise ValueError(
            f"{theirs.key}={theirs.path} was drawn for {other[1]!r}, where {ours.path} was for "
            f"{other[0]!r}; draw both for the same prompts"
        )
