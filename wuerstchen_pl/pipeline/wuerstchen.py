"""The pipeline that users hold: text to pictures, and from pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from wuerstchen_pl.layouts.read import read
from wuerstchen_pl.pipeline.cascade import Cascade
from wuerstchen_pl.pipeline.load import assemble
from wuerstchen_pl.sampling.pictures import (
    ImageOutput,
    Picture,
    as_type,
    check_output_type,
    cover,
    crop,
    to_mask,
    to_tensor,
)

PICTURE_TYPES = ("pil", "np", "pt")


class WuerstchenPipeline(Cascade):
    """The cascade, and what it makes of pictures; the arguments are those of ``Cascade``."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        prior: str | Path | None = None,
        variant: str | None = None,
        torch_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Load a model, of whatever layout, or what a run trained.

        Args:
            path: a model's folder or hub id, or Stage C's run folder or checkpoint.
            prior: Stage C's, where that lies apart: ``warp-ai/wuerstchen-prior`` beside
                ``warp-ai/wuerstchen``.
            variant: ``fp16`` reads ``*.fp16.safetensors`` of diffusers' layout.
            torch_dtype: of the weights.
            device: to work on.

        Raises:
            FileNotFoundError: if there is nothing, or a part is missing.
            ValueError: if it is damaged, or no model.
        """
        apart = None if prior is None else str(prior)
        model = read(str(path), prior=apart, variant=variant)
        pipeline = cls(**assemble(model, str(path)))
        pipeline.source = model.source
        return pipeline.to(device, torch_dtype)

    @torch.no_grad()
    def encode(self, image: Picture | Sequence[Picture]) -> Tensor:
        """Pictures -> (B, S, h, w) semantic latents in the compressor's scale.

        Args:
            image: PIL pictures of one size, or (B, 3, H, W) or (3, H, W) in [0, 1].

        Raises:
            ValueError: if there is no compressor.
        """
        if self.compressor is None:
            raise ValueError(
                "this model has no compressor, without which pictures cannot be read; load one "
                "that has (the published one lies in model_v2_stage_b.pt)"
            )
        with self.place.at_work(self.compressor):
            return self.compressor(to_tensor(image).to(self.place.device))

    def reconstruct(
        self, image: Picture | Sequence[Picture], prompt: str | Sequence[str] = "", **options: Any
    ) -> Any:
        """Pictures through compressor, Stage B and Stage A.

        Args:
            image: as for ``encode``; drawn at its size, or cropped to it.
            prompt: for a Stage B that reads text.
            options: further arguments of ``DecoderPipeline``, such as ``seed``.
        """
        images = to_tensor(image)
        height, width = images.shape[-2:]
        covered = cover(images, *self.announced_size(height, width))
        output_type = options.pop("output_type", "pil")
        check_output_type(output_type, PICTURE_TYPES)
        drawn = self.decoder(
            self.encode(covered), prompt, size=(covered.shape[-2], covered.shape[-1]),
            **{**options, "output_type": "pt", "return_dict": False},
        )  # fmt: skip
        found = as_type(crop(drawn, height, width), output_type)
        return ImageOutput(found) if options.get("return_dict", True) else found

    def image_to_image(
        self,
        prompt: str | Sequence[str],
        image: Picture | Sequence[Picture],
        strength: float = 0.6,
        **options: Any,
    ) -> Any:
        """Draw ``prompt`` on from a picture, in Stage C's latents.

        Args:
            prompt: one, or N.
            image: as for ``encode``; one, or one for each picture to be drawn.
            strength: in [0, 1]: time at which the picture's latents are noised; 0 keeps them.
            options: further arguments of the pipeline.
        """
        images = to_tensor(image)
        height, width = images.shape[-2:]
        semantic = self.encode(cover(images, *self.drawn_size(height, width)))
        return self(prompt, height, width, image_embeddings=semantic, strength=strength, **options)

    def vary(
        self, image: Picture | Sequence[Picture], strength: float = 0.6, **options: Any
    ) -> Any:
        """Draw pictures again, without a prompt or guidance; arguments as of ``image_to_image``."""
        prompts = [""] * len(to_tensor(image))
        return self.image_to_image(
            prompts, image, strength, **{"prior_guidance_scale": 0.0, **options}
        )

    def inpaint(
        self,
        prompt: str | Sequence[str],
        image: Picture,
        mask: Picture,
        strength: float = 1.0,
        **options: Any,
    ) -> Any:
        """Draw a part of a picture anew.

        Args:
            prompt: what to draw.
            image: one, as for ``encode``.
            mask: of its size, white (1) where to draw; outside, the picture stays to the pixel.
            strength: as of ``image_to_image``.
            options: further arguments of the pipeline.

        Raises:
            ValueError: if the mask is of another size.
        """
        original, painted = to_tensor(image), to_mask(mask)
        height, width = original.shape[-2:]
        if painted.shape[-2:] != original.shape[-2:]:
            raise ValueError(
                f"the mask has {painted.shape[-2]} x {painted.shape[-1]} px, and the picture "
                f"{height} x {width}; give them the same size"
            )
        size = self.drawn_size(height, width)
        output_type, return_dict = options.pop("output_type", "pil"), options.get("return_dict")
        check_output_type(output_type, PICTURE_TYPES)
        drawn = self(
            prompt, height, width, image_embeddings=self.encode(cover(original, *size)),
            mask=self.prior.mask_for(cover(painted, *size), *size), strength=strength,
            **{**options, "output_type": "pt", "return_dict": False},
        )  # fmt: skip
        found = as_type(torch.lerp(original.to(drawn), drawn, painted.to(drawn)), output_type)
        return found if return_dict is False else ImageOutput(found)
