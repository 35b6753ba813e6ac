"""Text to images: Stage C, Stage B and Stage A as one."""

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
"""Longest side in pixels: twice what the published model was shown."""


class CascadePipeline:
    """The cascade, from text to pixels.

    Args:
        prior: text to semantic latents; usable alone.
        decoder: semantic latents to images; usable alone.
        compressor: images to semantic latents, where there is one.
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
        """The networks, in the order in which they work."""
        parts = (
            self.prior.text_encoder, self.prior.prior, self.decoder.text_encoder,
            self.decoder.decoder, self.decoder.vqgan, self.compressor,
        )  # fmt: skip
        return [part for part in parts if part is not None]

    # Where and how to work

    def to(
        self,
        device: torch.device | torch.dtype | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Work on ``device``, with weights of ``dtype``, or with one of the two alone.

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
        """Keep only the part at work on ``device``, and the others on the CPU."""
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
        """Draw; the arguments are those of diffusers' ``WuerstchenCombinedPipeline``, and more.

        Those of ``PriorPipeline`` and ``DecoderPipeline`` bear the same names there, without
        ``prior_`` and ``decoder_``. And:

        Args:
            prompt: one, or N; an image does not depend on the others if ``seed`` or a list of
                generators is given.
            height: in pixels; if no step of ``size_multiple``, more is drawn, and cropped.
            width: likewise.
            seed: short for ``generator``: one for each image, or the first of as many as needed.
            image_embeddings: see ``image_to_image``, as ``strength`` and ``mask``.

        Returns:
            N ``num_images_per_prompt`` images.

        Raises:
            ValueError: naming the argument, its value and the fix.
        """
        check_output_type(output_type, OUTPUT_TYPES)
        drawn_height, drawn_width = self.padded_size_with_warning(height, width)
        prompts = Prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        number = count_prompts(prompts) * check_num_images(num_images_per_prompt)
        generator = resolve_generator(seed, generator, number)
        # what Stage B will be asked for, refused before Stage C has worked
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
            height=drawn_height,
            width=drawn_width,
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
        drawn = self.decoder(
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
            size=(drawn_height, drawn_width),
            sampler=decoder_sampler,
            guidance_rescale=decoder_guidance_rescale,
            guidance_interval=decoder_guidance_interval,
            progress=progress,
        )
        if output_type != "latent":
            drawn = center_crop(drawn, int(height), int(width))
        images = convert_output(drawn, output_type)
        return ImageOutput(images) if return_dict else images

    @property
    def size_multiple(self) -> int:
        """Step of heights and widths in which the stages fit: 128 px as published.

        The least multiple of Stage B's step that is a whole number of semantic positions.
        """
        step = self.decoder.vqgan.factor * self.decoder.decoder.size_multiple
        position = Fraction(self.prior.resolution_multiple).limit_denominator(8)  # 42.67 is 128 / 3
        return math.lcm(step * position.denominator, position.numerator) // position.denominator

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """The size, in steps of ``size_multiple``, that covers an image.

        Raises:
            ValueError: for a side below the step, or above ``MAX_SIDE``.
        """
        step = self.size_multiple
        for key, value in (("height", height), ("width", width)):
            if value != int(value) or not step <= value <= MAX_SIDE:
                raise ValueError(
                    f"{key}={value} cannot be drawn; use {step} to {MAX_SIDE}, best in steps of "
                    f"{step}"
                )
        return math.ceil(height / step) * step, math.ceil(width / step) * step

    def padded_size_with_warning(self, height: int, width: int) -> tuple[int, int]:
        """As ``padded_size``; says so if it is not what was asked for."""
        drawn = self.padded_size(height, width)
        if drawn != (height, width):
            warnings.warn(
                f"{height} x {width} px is not a step of {self.size_multiple}: {drawn[0]} x "
                f"{drawn[1]} px are drawn, and cropped",
                stacklevel=3,
            )
        return drawn
