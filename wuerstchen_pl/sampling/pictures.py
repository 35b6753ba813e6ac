"""Between tensors and the pictures that users give and ask for."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.transforms import functional as TF

Picture = Image.Image | Tensor
OutputType = Literal["pil", "np", "pt", "latent"]
OUTPUT_TYPES: tuple[str, ...] = get_args(OutputType)


class Keyed(tuple):
    """Lets a named tuple be asked by name as well, as diffusers' outputs can be."""

    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        return getattr(self, key) if isinstance(key, str) else super().__getitem__(key)


class _ImageOutput(NamedTuple):
    images: Any


class ImageOutput(Keyed, _ImageOutput):
    """What a pipeline drew: PIL pictures, (B, H, W, 3) or (B, 3, H, W) in [0, 1], or latents."""


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
    """PIL pictures or tensors -> (B, 3, H, W) float32 in [0, 1]; what is transparent is white.

    Raises:
        ValueError: if they are no pictures, or of several sizes, or no values in [0, 1].
    """
    return _batch(image, channels=3)


def to_mask(image: Picture) -> Tensor:
    """A PIL picture's lightness, or a tensor -> (B, 1, H, W) float32 in [0, 1].

    Raises:
        ValueError: as of ``to_tensor``.
    """
    return _batch(image, channels=1)


def _batch(image: Picture | Sequence[Picture], *, channels: int) -> Tensor:
    parts: list[Any] = list(image) if isinstance(image, list | tuple) else [image]
    tensors = [_tensor(part, channels) for part in parts]
    sizes = {tuple(tensor.shape[-2:]) for tensor in tensors}
    if len(sizes) != 1:
        raise ValueError(f"pictures have the sizes {sorted(sizes)}; give one size, and one or more")
    return torch.cat(tensors)


def _tensor(part: Picture, channels: int) -> Tensor:
    if isinstance(part, Image.Image):
        return TF.to_tensor(part.convert("L") if channels == 1 else _on_white(part))[None]
    if not isinstance(part, Tensor) or part.ndim not in (3, 4) or part.shape[-3] != channels:
        told = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
        raise ValueError(f"{told} is no picture; give PIL's, or tensors (B, {channels}, H, W)")
    values = part.float() if part.is_floating_point() else part.float() / 255
    if not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(
            f"a picture has values from {float(values.min()):.3g} to {float(values.max()):.3g}; "
            "give floats in [0, 1], or bytes"
        )
    return values if values.ndim == 4 else values[None]


def _on_white(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def cover(images: Tensor, height: int, width: int) -> Tensor:
    """(B, C, H, W) -> (B, C, height, width), in the middle, its edge repeated around it."""
    down, across = height - images.shape[-2], width - images.shape[-1]
    around = (across // 2, across - across // 2, down // 2, down - down // 2)
    return torch.nn.functional.pad(images, around, mode="replicate")


def write_png(path: Path, picture: Tensor, facts: dict) -> None:
    """Write (3, H, W) in [0, 1] as PNG with ``facts`` in its metadata; whole, or not at all.

    Raises:
        OSError: if it cannot be written, naming the path.
    """
    info = PngInfo()
    for key, value in facts.items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    aside = path.with_suffix(f".{os.getpid()}.partial")
    try:
        made = not path.parent.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            to_pil(picture).save(aside, format="PNG", pnginfo=info)
            os.replace(aside, path)
        except OSError:
            aside.unlink(missing_ok=True)
            if made:
                path.parent.rmdir()
            raise
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror or error}") from error
