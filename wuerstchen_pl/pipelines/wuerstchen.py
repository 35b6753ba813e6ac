"""The user-facing pipeline: text to image, and image to image."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from wuerstchen_pl.formats.hub import is_hub_id
from wuerstchen_pl.formats.registry import read_model
from wuerstchen_pl.pipelines.components import build_components
from wuerstchen_pl.pipelines.diffusers_names import DiffusersNames
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


class WuerstchenPipeline(DiffusersNames):
    """The cascade with image inputs; for its arguments, see ``CascadePipeline``."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        prior: str | Path | None = None,
        variant: str | None = None,
        revision: str | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        use_safetensors: bool | None = None,
        device: torch.device | str = "cpu",
        allow_mismatch: bool = False,
    ) -> Self:
        """Load a model of any supported format, or the model that a run trained.

        Args:
            path: a model's folder or hub id, or a run folder or checkpoint of Stage C.
            prior: folder or hub id of a separate Stage C. None with a hub id that has none, such
                as ``warp-ai/wuerstchen``, is that id followed by ``-prior``.
            variant: of the weights in the diffusers format: ``fp16`` reads
                ``*.fp16.safetensors``, and warns if there are only those without a variant. None
                reads those without a variant, or else the only variant that there is.
            revision: branch, tag or commit of ``path`` on the hub.
            torch_dtype: dtype of the weights; None is float32.
            dtype: another name of ``torch_dtype``, as in newer releases of diffusers.
            use_safetensors: True and None read safetensors. False is refused: the pickles that are
                read are the authors' ``.pt`` files, by their path.
            device: device to run on.
            allow_mismatch: accept a ``prior`` that was trained with another compressor.

        Raises:
            FileNotFoundError: if the model or a part of it is missing.
            ValueError: if it is damaged, or not a model.
        """
        if use_safetensors is False:
            raise ValueError(
                "use_safetensors=False would read pickles; remove it, or set path to a .pt file"
            )
        if dtype is not None and torch_dtype not in (None, dtype):
            raise ValueError(f"dtype={dtype} and torch_dtype={torch_dtype} differ; use one of them")
        read = partial(
            read_model, str(path),
            variant=variant, revision=revision, allow_mismatch=allow_mismatch,
        )  # fmt: skip
        model = read(prior=None if prior is None else str(prior))
        if prior is None and "prior" not in model.parts and is_hub_id(str(path)):
            model = read(prior=f"{path}-prior")
        pipeline = cls(**build_components(model, str(path)), source=model.source)
        pipeline._describe(model)
        return pipeline.to(device, dtype or torch_dtype or torch.float32)

    @torch.no_grad()
    def encode(self, image: ImageInput | Sequence[ImageInput]) -> Tensor:
        """Images -> (B, S, h, w) semantic latents in the compressor's scale.

        Args:
            image: one or more of one size: PIL images, paths, (H, W, 3) arrays, or tensors
                (B, 3, H, W) or (3, H, W); floats in [0, 1] or uint8.

        Raises:
            ValueError: if there is no compressor.
        """
        if self.compressor is None:
            raise ValueError(
                "this model has no compressor to encode images; load one that has it (the "
                "published one is in model_v2_stage_b.pt)"
            )
        with self.placement.on_device(self.compressor):
            return self.compressor(to_tensor(image).to(self.placement.device))

    def reconstruct(
        self,
        image: ImageInput | Sequence[ImageInput],
        prompt: str | Sequence[str] = "",
        **options: Any,
    ) -> Any:
        """Encode images with the compressor and decode them with Stage B and Stage A.

        Args:
            image: as for ``encode``; the output has its size.
            prompt: for a Stage B that reads text.
            options: further arguments of ``DecoderSampler``, such as ``seed``.
        """
        images = to_tensor(image)
        height, width = images.shape[-2:]
        padded = pad_to(images, *self.padded_size_with_warning(height, width))
        output_type = options.pop("output_type", "pil")
        check_output_type(output_type, IMAGE_TYPES)
        output = self.decoder(
            self.encode(padded), prompt, size=(padded.shape[-2], padded.shape[-1]),
            **{**options, "output_type": "pt", "return_dict": False},
        )  # fmt: skip
        reconstruction = convert_output(center_crop(output, height, width), output_type)
        return ImageOutput(reconstruction) if options.get("return_dict", True) else reconstruction

    def image_to_image(
        self,
        prompt: str | Sequence[str],
        image: ImageInput | Sequence[ImageInput],
        strength: float = 0.6,
        **options: Any,
    ) -> Any:
        """Generate images of ``prompt`` from noised semantic latents of images.

        Args:
            prompt: one, or a list.
            image: as for ``encode``; one, or one per prompt.
            strength: time in [0, 1] that the image's latents are noised to; 0 keeps them.
            options: further arguments of the pipeline.
        """
        images = to_tensor(image)
        height, width = images.shape[-2:]
        semantic = self.encode(pad_to(images, *self.padded_size(height, width)))
        return self(prompt, height, width, image_embeddings=semantic, strength=strength, **options)

    def vary(
        self, image: ImageInput | Sequence[ImageInput], strength: float = 0.6, **options: Any
    ) -> Any:
        """Variations of images, without a prompt or guidance; see ``image_to_image``."""
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
        """Regenerate a masked region of an image.

        Args:
            prompt: what to generate.
            image: one, as for ``encode``.
            mask: of the image's size, 1 (white) where to generate; other pixels do not change.
            strength: see ``image_to_image``.
            options: further arguments of the pipeline.

        Raises:
            ValueError: if the mask's size differs from the image's.
        """
        original, region = to_tensor(image), to_mask(mask)
        height, width = original.shape[-2:]
        if region.shape[-2:] != original.shape[-2:]:
            raise ValueError(
                f"the mask has {region.shape[-2]} x {region.shape[-1]} px, and the image "
                f"{height} x {width}; use the same size"
            )
        size = self.padded_size(height, width)
        output_type, return_dict = options.pop("output_type", "pil"), options.get("return_dict")
        check_output_type(output_type, IMAGE_TYPES)
        output = self(
            prompt, height, width, image_embeddings=self.encode(pad_to(original, *size)),
            mask=self.prior.mask_for(pad_to(region, *size), *size), strength=strength,
            **{**options, "output_type": "pt", "return_dict": False},
        )  # fmt: skip
        images = convert_output(
            torch.lerp(original.to(output), output, region.to(output)), output_type
        )
        return images if return_dict is False else ImageOutput(images)
