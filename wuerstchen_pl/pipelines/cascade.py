"""Text to images with Stage C, Stage B and Stage A."""

import math
import warnings
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Self

import torch
from torch import Tensor

from wuerstchen_pl.diffusion.guidance import Guidance
from wuerstchen_pl.diffusion.sampler import (
    Generator,
    SamplerName,
    resolve_generator,
    resolve_timesteps,
)
from wuerstchen_pl.models.compressor import SemanticCompressor
from wuerstchen_pl.sampling.decoder import DecoderSampler
from wuerstchen_pl.sampling.device import cast_weights
from wuerstchen_pl.sampling.images import (
    OUTPUT_TYPES,
    ImageOutput,
    OutputType,
    center_crop,
    check_output_type,
    convert_output,
)
from wuerstchen_pl.sampling.loop import DenoiseParams, LegacyCallback, StepCallback
from wuerstchen_pl.sampling.prior import PriorSampler
from wuerstchen_pl.sampling.prompts import Prompts, check_num_images, count_prompts

MAX_SIDE = 4096
"""Longest side in pixels: twice that of the published model's training images."""


class CascadePipeline:
    """The cascade, from text to pixels.

    Args:
        prior: text to semantic latents; usable alone.
        decoder: semantic latents to images; usable alone.
        compressor: images to semantic latents; None for text to image only.
        source: ``path`` and ``sha256`` of the checkpoint that the networks were loaded from.
    """

    def __init__(
        self,
        *,
        prior: PriorSampler,
        decoder: DecoderSampler,
        compressor: SemanticCompressor | None = None,
        source: Mapping[str, str] | None = None,
    ) -> None:
        self.prior, self.decoder, self.compressor = prior, decoder, compressor
        self.placement = prior.placement = decoder.placement
        self.source = source
        for module in self.modules:
            module.eval().requires_grad_(False)

    @property
    def modules(self) -> list[torch.nn.Module]:
        """The networks, in the order of their use."""
        parts = (
            self.prior.text_encoder, self.prior.prior, self.decoder.text_encoder,
            self.decoder.decoder, self.decoder.vqgan, self.compressor,
        )  # fmt: skip
        return [part for part in parts if part is not None]

    # Device, dtype and compilation

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
        self.placement.device = target
        return self

    def enable_model_offload(self, device: torch.device | str = "cuda") -> Self:
        """Keep only the network in use on ``device``, and the others on the CPU."""
        self.placement.offload = True
        return self.to(device)

    def compile(self, **options: Any) -> Self:
        """Compile the denoisers and Stage A's decoder; ``options`` are ``torch.compile``'s."""
        self.prior.predict_noise = torch.compile(self.prior.predict_noise, **options)
        self.decoder.predict_noise = torch.compile(self.decoder.predict_noise, **options)
        self.decoder.decode = torch.compile(self.decoder.decode, **options)
        return self

    # Text to images

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int = 512,
        width: int = 512,
        prior_num_inference_steps: int = 60,
        prior_timesteps: Sequence[float] | None = None,
        prior_guidance_scale: float = 4.0,
        num_inference_steps: int = 12,
        decoder_timesteps: Sequence[float] | None = None,
        decoder_guidance_scale: float = 0.0,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        num_images_per_prompt: int = 1,
        generator: Generator = None,
        latents: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        prior_callback_on_step_end: StepCallback | None = None,
        prior_callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        prior_callback: LegacyCallback | None = None,
        prior_callback_steps: int = 1,
        callback: LegacyCallback | None = None,
        callback_steps: int = 1,
        seed: int | Sequence[int] | None = None,
        prior_sampler: SamplerName = "ddpm",
        decoder_sampler: SamplerName = "ddpm",
        prior_guidance_rescale: float = 0.0,
        prior_guidance_interval: tuple[float, float] = (0.0, 1.0),
        decoder_guidance_rescale: float = 0.0,
        decoder_guidance_interval: tuple[float, float] = (0.0, 1.0),
        image_embeddings: Tensor | None = None,
        strength: float = 1.0,
        mask: Tensor | None = None,
        progress: bool = True,
    ) -> Any:
        """Generate images; extends the arguments of diffusers' ``WuerstchenCombinedPipeline``.

        For arguments not listed here, see ``PriorSampler`` and ``DecoderSampler``, which have them
        without the prefixes ``prior_`` and ``decoder_``.

        Args:
            prompt: one, or a list of N; with ``seed`` or a list of generators, an image does not
                depend on the others of its batch.
            height: in pixels; if not a multiple of ``size_multiple``, rounded up and cropped.
            width: see ``height``.
            seed: alternative to ``generator``: one per image, or s for s, s + 1, ...
            image_embeddings: see ``PriorSampler``, as for ``strength`` and ``mask``.

        Returns:
            N x ``num_images_per_prompt`` images.

        Raises:
            ValueError: if an argument is invalid.
        """
        check_output_type(output_type, OUTPUT_TYPES)
        padded_height, padded_width = self.padded_size_with_warning(height, width)
        prompts = Prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        num_images = count_prompts(prompts) * check_num_images(num_images_per_prompt)
        generator = resolve_generator(seed, generator, num_images)
        # rejects invalid arguments of Stage B before Stage C runs
        DenoiseParams(
            times=resolve_timesteps(num_inference_steps, decoder_timesteps),
            generator=generator,
            guidance=Guidance(
                scale=decoder_guidance_scale,
                rescale=decoder_guidance_rescale,
                interval=decoder_guidance_interval,
            ),
            method=decoder_sampler,
            callback_inputs=callback_on_step_end_tensor_inputs or (),
        ).check(self.decoder.CALLBACK_INPUTS)
        semantic = self.prior(
            prompt=prompt,
            height=padded_height,
            width=padded_width,
            num_inference_steps=prior_num_inference_steps,
            timesteps=prior_timesteps,
            guidance_scale=prior_guidance_scale,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            callback_on_step_end=prior_callback_on_step_end,
            callback=prior_callback,
            callback_steps=prior_callback_steps,
            callback_on_step_end_tensor_inputs=prior_callback_on_step_end_tensor_inputs,
            sampler=prior_sampler,
            guidance_rescale=prior_guidance_rescale,
            guidance_interval=prior_guidance_interval,
            image_embeddings=image_embeddings,
            strength=strength,
            mask=mask,
            progress=progress,
        )[0]
        output = self.decoder(
            semantic,
            prompt=prompt,
            num_inference_steps=num_inference_steps,
            timesteps=decoder_timesteps,
            guidance_scale=decoder_guidance_scale,
            negative_prompt=negative_prompt,
            generator=generator,
            output_type="latent" if output_type == "latent" else "pt",
            return_dict=False,
            callback_on_step_end=callback_on_step_end,
            callback=callback,
            callback_steps=callback_steps,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            size=(padded_height, padded_width),
            sampler=decoder_sampler,
            guidance_rescale=decoder_guidance_rescale,
            guidance_interval=decoder_guidance_interval,
            progress=progress,
        )
        if output_type != "latent":
            output = center_crop(output, int(height), int(width))
        images = convert_output(output, output_type)
        return ImageOutput(images) if return_dict else images

    @property
    def size_multiple(self) -> int:
        """Number of pixels that heights and widths are multiples of: 128 as published.

        The least multiple of Stage B's that is a whole number of semantic positions.
        """
        multiple = self.decoder.vqgan.factor * self.decoder.decoder.size_multiple
        position = Fraction(self.prior.resolution_multiple).limit_denominator(8)  # 42.67 is 128 / 3
        return math.lcm(multiple * position.denominator, position.numerator) // position.denominator

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """The size of an image, rounded up to multiples of ``size_multiple``.

        Raises:
            ValueError: for a side below ``size_multiple`` or above ``MAX_SIDE``.
        """
        multiple = self.size_multiple
        for key, value in (("height", height), ("width", width)):
            if value != int(value) or not multiple <= value <= MAX_SIDE:
                raise ValueError(
                    f"{key}={value} is not supported; use {multiple} to {MAX_SIDE}, best a "
                    f"multiple of {multiple}"
                )
        return math.ceil(height / multiple) * multiple, math.ceil(width / multiple) * multiple

    def padded_size_with_warning(self, height: int, width: int) -> tuple[int, int]:
        """As ``padded_size``, with a warning if it differs from the requested size."""
        padded = self.padded_size(height, width)
        if padded != (height, width):
            warnings.warn(
                f"{height} x {width} px is not a multiple of {self.size_multiple}; generating "
                f"{padded[0]} x {padded[1]} px and cropping",
                stacklevel=3,
            )
        return padded
