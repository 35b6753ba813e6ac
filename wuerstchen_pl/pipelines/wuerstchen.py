"""The pipeline that users hold: text to images, and from images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from wuerstchen_pl.formats.registry import read_model
from wuerstchen_pl.pipelines.cascade import CascadePipeline
from wuerstchen_pl.pipelines.components import build_components
from wuerstchen_pl.sampling.images import (
    ImageInput,
    ImageOutput,
    center_crop,
    check_output_type,
    convert_output,
    pad_to,
    to_mask,
    to_tensor,
)

IMAGE_TYPES = ("pil", "np", "pt")


class WuerstchenPipeline(CascadePipeline):
    """The cascade, and what it makes of images; the arguments are those of ``Cascade``."""

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
        """Load a model, of whatever format, or what a run trained.

        Args:
            path: a model's folder or hub id, or Stage C's run folder or checkpoint.
            prior: Stage C's, where that lies apart: ``warp-ai/wuerstchen-prior`` beside
                ``warp-ai/wuerstchen``.
            variant: ``fp16`` reads ``*.fp16.safetensors`` of diffusers' format.
            torch_dtype: of the weights.
            device: to work on.

        Raises:
            FileNotFoundError: if there is nothing, or a part is missing.
            ValueError: if it is damaged, or no model.
        """
        apart = None if prior is None else str(prior)
        model = read_model(str(path), prior=apart, variant=variant)
        pipeline = cls(**build_components(model, str(path)), source=model.source)
        return pipeline.to(device, torch_dtype)

    @torch.no_grad()
    def encode(self, image: ImageInput | Sequence[ImageInput]) -> Tensor:
        """Images -> (B, S, h, w) semantic latents in the compressor's scale.

        Args:
            image: PIL images of one size, or (B, 3, H, W) or (3, H, W) in [0, 1].

        Raises:
            ValueError: if there is no compressor.
        """
        if self.compressor is None:
            raise ValueError(
                "this model has no compressor, without which images cannot be read; load one "
                "that has (the published one lies in model_v2_stage_b.pt)"
            )
        with self.placement.on_device(self.compressor):
            return self.compressor(to_tensor(image).to(self.placement.device))

    def reconstruct(
        self,
        image: ImageInput | Sequence[ImageInput],
        prompt: str | Sequence[str] = "",
        **options: Any,
    ) -> Any:
        """Images through compressor, Stage B and Stage A.

        Args:
            image: as for ``encode``; drawn at its size, or cropped to it.
            prompt: for a Stage B that reads text.
            options: further arguments of ``DecoderPipeline``, such as ``seed``.
        """
        images = to_tensor(image)
        height, width = images.shape[-2:]
        covered = pad_to(images, *self.padded_size_with_warning(height, width))
        output_type = options.pop("output_type", "pil")
        check_output_type(output_type, IMAGE_TYPES)
        drawn = self.decoder(
            self.encode(covered), prompt, size=(covered.shape[-2], covered.shape[-1]),
            **{**options, "output_type": "pt", "return_dict": False},
        )  # fmt: skip
        found = convert_output(center_crop(drawn, height, width), output_type)
        return ImageOutput(found) if options.get("return_dict", True) else found

    def image_to_image(
        self,
        prompt: str | Sequence[str],
        image: ImageInput | Sequence[ImageInput],
        strength: float = 0.6,
        **options: Any,
    ) -> Any:
        """Draw ``prompt`` on from an image, in Stage C's latents.

        Args:
            prompt: one, or N.
            image: as for ``encode``; one, or one for each image to be drawn.
            strength: in [0, 1]: time at which the image's latents are noised; 0 keeps them.
            options: further arguments of the pipeline.
        """
        images = to_tensor(image)
        height, width = images.shape[-2:]
        semantic = self.encode(pad_to(images, *self.padded_size(height, width)))
        return self(prompt, height, width, image_embeddings=semantic, strength=strength, **options)

    def vary(
        self, image: ImageInput | Sequence[ImageInput], strength: float = 0.6, **options: Any
    ) -> Any:
        """Draw images again, without a prompt or guidance; arguments see ``image_to_image``."""
        prompts = [""] * len(to_tensor(image))
        return self.image_to_image(
            prompts, image, strength, **{"prior_guidance_scale": 0.0, **options}
        )

    def inpaint(
        self,
        prompt: str | Sequence[str],
        image: ImageInput,
        mask: ImageInput,
        strength: float = 1.0,
        **options: Any,
    ) -> Any:
        """Generate a part of an image again.

        Args:
            prompt: what to draw.
            image: one, as for ``encode``.
            mask: of its size, white (1) where to draw; outside, the image stays to the pixel.
            strength: see ``image_to_image``.
            options: further arguments of the pipeline.

        Raises:
            ValueError: if the mask is of another size.
        """
        original, painted = to_tensor(image), to_mask(mask)
        height, width = original.shape[-2:]
        if painted.shape[-2:] != original.shape[-2:]:
            raise ValueError(
                f"the mask has {painted.shape[-2]} x {painted.shape[-1]} px, and the image "
                f"{height} x {width}; give them the same size"
            )
        size = self.padded_size(height, width)
        output_type, return_dict = options.pop("output_type", "pil"), options.get("return_dict")
        check_output_type(output_type, IMAGE_TYPES)
        drawn = self(
            prompt, height, width, image_embeddings=self.encode(pad_to(original, *size)),
            mask=self.prior.mask_for(pad_to(painted, *size), *size), strength=strength,
            **{**options, "output_type": "pt", "return_dict": False},
        )  # fmt: skip
        found = convert_output(
            torch.lerp(original.to(drawn), drawn, painted.to(drawn)), output_type
        )
        return found if return_dict is False else ImageOutput(found)
