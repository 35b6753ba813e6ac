"""The pipeline interface that the programs and the evaluation use."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Self

import torch
from torch import Tensor

from wuerstchen_pl.diffusion.sampler import Generator
from wuerstchen_pl.io.atomic import Source
from wuerstchen_pl.models.vqgan import VQGAN
from wuerstchen_pl.sampling.config import SamplingConfig
from wuerstchen_pl.sampling.control import Control
from wuerstchen_pl.sampling.device import DevicePlacement, cast_weights
from wuerstchen_pl.sampling.images import center_crop
from wuerstchen_pl.sampling.prior import PriorSampler
from wuerstchen_pl.sampling.prompts import Prompts

_DEFAULT_MULTIPLES = 8
MAX_SIDE = 4096
"""Longest side in pixels: twice that of the published model's training images."""


class TextToImage(ABC):
    """A text-to-image model: a prior conditioned on text, and what decodes its latents.

    An abstract class, not a protocol, as all models handle devices and sizes in the same way.

    Args:
        prior: text to latents.
        vqgan: Stage A.
        placement: the device to run on.
        source: path and hash of the checkpoint that the networks were loaded from.
        image_size: side in pixels of the squares with the area of the training images, if known.
    """

    def __init__(
        self,
        *,
        prior: PriorSampler,
        vqgan: VQGAN,
        placement: DevicePlacement,
        source: Source | None,
        image_size: int | None,
    ) -> None:
        self.prior, self.vqgan, self.source = prior, vqgan, source
        self.image_size = image_size
        self.is_compiled = False
        self.placement = placement
        prior.share_placement(placement)
        for module in self.modules:
            module.eval().requires_grad_(False)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        height: int,
        width: int,
        *,
        config: SamplingConfig,
        generator: Generator,
        control: Control | None = None,
    ) -> Tensor:
        """Generate one image per prompt.

        Args:
            prompts: N prompts.
            height: in pixels; if not a multiple of ``size_multiple``, rounded up and cropped.
            width: see ``height``.
            config: sampling settings; those of stages that the model lacks are not used.
            generator: a list with one generator per image makes images independent of the batch.
            control: what a ControlNet reads.

        Returns:
            (N, 3, height, width) in [0, 1].

        Raises:
            ValueError: if an argument is invalid.
        """
        size = self.padded_size_with_warning(height, width)
        images = self._generate(Prompts(prompts), size, config, generator, control)
        return center_crop(images, height, width)

    @abstractmethod
    def _generate(
        self, prompts: Prompts, size: tuple[int, int], config: SamplingConfig,
        generator: Generator, control: Control | None,
    ) -> Tensor:  # fmt: skip
        """Images (N, 3, *size) in [0, 1], of a size that the model supports."""

    @property
    @abstractmethod
    def modules(self) -> list[torch.nn.Module]:
        """The networks in the order of their use."""

    @property
    @abstractmethod
    def size_multiple(self) -> int:
        """Number of pixels that heights and widths are multiples of."""

    @property
    def default_side(self) -> int:
        """Height and width of an image if none are given: as in training; 1,024 as published."""
        side = self.image_size or _DEFAULT_MULTIPLES * self.size_multiple
        return max(1, round(side / self.size_multiple)) * self.size_multiple

    def size(self, height: int | str | None, width: int | str | None) -> tuple[int, int]:
        """Height and width in pixels, as numbers; None is ``default_side``.

        Raises:
            ValueError: if one is not a whole number.
        """
        return self._side("height", height), self._side("width", width)

    def _side(self, key: str, value: int | str | None) -> int:
        with suppress(TypeError, ValueError):
            if (side := float(self.default_side if value is None else value)).is_integer():
                return int(side)
        raise ValueError(f"{key}={value!r} is not a whole number of pixels, such as 512; use one")

    def compile(self, **options: Any) -> Self:
        """Compile the networks that draw; ``options`` are those of ``torch.compile``."""
        self._compile(**options)
        self.is_compiled = True
        return self

    @abstractmethod
    def _compile(self, **options: Any) -> None: ...

    def to(
        self,
        device: torch.device | torch.dtype | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Run on ``device`` and cast weights to ``dtype``; None keeps the current one.

        Latents stay float32.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        target = self.placement.device if device is None else torch.device(device)
        for module in self.modules:
            if dtype is not None:
                cast_weights(module, dtype)
            module.to("cpu" if self.placement.offload else target)
        self.placement.move_to(target)
        return self

    def enable_model_cpu_offload(self, device: torch.device | str = "cuda") -> Self:
        """Keep only the network in use on ``device``, and the others on the CPU."""
        self.placement.enable_offload()
        return self.to(device)

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """The size of an image, rounded up to multiples of ``size_multiple``.

        Raises:
            ValueError: for a side below ``size_multiple`` or above ``MAX_SIDE``.
        """
        multiple = self.size_multiple
        for key, value in (("height", height), ("width", width)):
            if not multiple <= value <= MAX_SIDE:
                raise ValueError(
                    f"{key}={value} is not supported; use {multiple} to {MAX_SIDE}, preferably a "
                    f"multiple of {multiple}"
                )
        return math.ceil(height / multiple) * multiple, math.ceil(width / multiple) * multiple

    def padded_size_with_warning(self, height: int, width: int) -> tuple[int, int]:
        """Like ``padded_size``, with a warning if it differs from the requested size."""
        padded = self.padded_size(height, width)
        if padded != (height, width):
            warnings.warn(
                f"{height} x {width} px is not a multiple of {self.size_multiple}; generating "
                f"{padded[0]} x {padded[1]} px and cropping",
                stacklevel=3,
            )
        return padded
