"""Between tensors and the pictures that users give and ask for."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as TF

Picture = Image.Image | Tensor
OutputType = Literal["pil", "np", "pt", "latent"]
OUTPUT_TYPES: tuple[str, ...] = get_args(OutputType)


class ImageOutput(NamedTuple):
    """What a pipeline drew: PIL pictures, (B, H, W, 3) or (B, 3, H, W) in [0, 1], or latents."""

    images: Any


def check_output_type(output_type: str, allowed: tuple[str, ...]) -> None:
    """Refuse another one.

    Raises:
        ValueError: naming those there are.
    """
    if output_type not in allowed:
        raise ValueError(f"output_type={output_type!r} is unknown; use {' or '.join(allowed)}")


def to_pil(picture: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> an RGB picture, rounded to 8 bits."""
    pixels = (picture.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def as_type(images: Tensor, output_type: OutputType) -> Any:
    """(B, 3, H, W) in [0, 1], or latents -> as ``output_type`` says."""
    if output_type == "pil":
        return [to_pil(picture) for picture in images]
    if output_type == "np":
        return images.permute(0, 2, 3, 1).float().cpu().numpy()
    return images


def crop(images: Tensor, height: int, width: int) -> Tensor:
    """The middle (height, width) of (B, 3, H, W)."""
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return images[..., top : top + height, left : left + width]


def to_tensor(image: Picture | Sequence[Picture]) -> Tensor:
    """PIL pictures or tensors -> (B, 3 or 1, H, W) float32 in [0, 1]."""
    if isinstance(image, Tensor):
        return (image if image.ndim == 4 else image[None]).float()
    if isinstance(image, Image.Image):
        image = [image]
    return torch.stack([part if isinstance(part, Tensor) else _read(part) for part in image])


def _read(picture: Image.Image) -> Tensor:
    """RGB, or L where it is a mask, (C, H, W) in [0, 1]."""
    return TF.to_tensor(picture if picture.mode in ("RGB", "L") else picture.convert("RGB"))


def cover(images: Tensor, height: int, width: int) -> Tensor:
    """(B, C, H, W) -> (B, C, height, width), in the middle, its edge repeated around it."""
    down, across = height - images.shape[-2], width - images.shape[-1]
    around = (across // 2, across - across // 2, down // 2, down - down // 2)
    return torch.nn.functional.pad(images, around, mode="replicate")
