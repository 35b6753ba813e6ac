"""Conversion between tensors and the image types of the pipelines' inputs and outputs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wuerstchen_pl.io.images import to_pil, to_rgb

ImageInput = Image.Image | Tensor | np.ndarray | str | Path
OutputType = Literal["pil", "np", "pt", "latent"]
OUTPUT_TYPES: tuple[str, ...] = get_args(OutputType)


class OutputTuple(tuple):
    """A named tuple that can also be indexed by name, like diffusers' outputs."""

    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        return getattr(self, key) if isinstance(key, str) else super().__getitem__(key)


class _ImageOutput(NamedTuple):
    images: Any


class ImageOutput(OutputTuple, _ImageOutput):
    """A pipeline's PIL images, (B, H, W, 3) or (B, 3, H, W) arrays in [0, 1], or latents."""


def check_output_type(output_type: str, allowed: tuple[str, ...]) -> None:
    """Reject an unknown ``output_type``.

    Raises:
        ValueError: if it is not in ``allowed``.
    """
    if output_type not in allowed:
        raise ValueError(f"output_type={output_type!r} is unknown; use {' or '.join(allowed)}")


def convert_output(images: Tensor, output_type: OutputType) -> Any:
    """(B, 3, H, W) in [0, 1], or latents -> a value of type ``output_type``."""
    if output_type == "pil":
        return [to_pil(image) for image in images]
    if output_type == "np":
        return images.permute(0, 2, 3, 1).float().cpu().numpy()
    return images


def center_crop(images: Tensor, height: int, width: int) -> Tensor:
    """(B, 3, H, W) -> (B, 3, height, width), cropped at the center."""
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return images[..., top : top + height, left : left + width]


def to_tensor(image: ImageInput | Sequence[ImageInput]) -> Tensor:
    """Images -> (B, 3, H, W) float32 in [0, 1]; transparent pixels become white.

    Args:
        image: one or more: PIL images, paths, arrays (H, W, 3) or (B, H, W, 3), or tensors
            (3, H, W) or (B, 3, H, W); floats in [0, 1] or uint8.

    Raises:
        ValueError: if they are not images, differ in size, or have values outside [0, 1].
    """
    return _batch(image, channels=3)


def to_mask(image: ImageInput) -> Tensor:
    """The lightness of an image or its path, or a tensor or array -> (B, 1, H, W) in [0, 1].

    Raises:
        ValueError: see ``to_tensor``.
    """
    return _batch(image, channels=1)


def _batch(image: ImageInput | Sequence[ImageInput], *, channels: int) -> Tensor:
    parts: list[Any] = list(image) if isinstance(image, list | tuple) else [image]
    tensors = [_tensor(part, channels) for part in parts]
    sizes = {tuple(tensor.shape[-2:]) for tensor in tensors}
    if len(sizes) != 1:
        raise ValueError(f"images have the sizes {sorted(sizes)}; use one or more of the same size")
    return torch.cat(tensors)


def _tensor(part: ImageInput, channels: int) -> Tensor:
    if isinstance(part, str | Path):
        with Image.open(part) as opened:
            return _tensor(opened.copy(), channels)
    if isinstance(part, np.ndarray):
        array = part[..., None] if channels == 1 and part.ndim == 2 else part
        part = torch.from_numpy(array.copy()).movedim(-1, -3) if array.ndim > 2 else part
    if isinstance(part, Image.Image):
        from torchvision.transforms import functional as TF  # slow, and few programs read images

        image = to_rgb(part)
        return TF.to_tensor(image.convert("L") if channels == 1 else image)[None]
    if not isinstance(part, Tensor) or part.ndim not in (3, 4) or part.shape[-3] != channels:
        is_array = isinstance(part, Tensor | np.ndarray)
        description = tuple(part.shape) if is_array else type(part).__name__
        raise ValueError(
            f"{description} is not an image; give PIL images, paths, arrays (H, W, {channels}), or "
            f"tensors (B, {channels}, H, W)"
        )
    values = part.float() if part.is_floating_point() else part.float() / 255
    if not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(
            f"an image has values from {float(values.min()):.3g} to {float(values.max()):.3g}; "
            "give floats in [0, 1], or uint8"
        )
    return values if values.ndim == 4 else values[None]


def pad_to(images: Tensor, height: int, width: int) -> Tensor:
    """(B, C, H, W) -> (B, C, height, width), centered, padded by repeating the edges."""
    rows, columns = height - images.shape[-2], width - images.shape[-1]
    padding = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    return torch.nn.functional.pad(images, padding, mode="replicate")
