"""Text to images with Stage C, Stage B and Stage A."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wuerstchen_pl.diffusion.sampler import Generator, SamplerName, resolve_generator
from wuerstchen_pl.io.atomic import Source
from wuerstchen_pl.models.compressor import SemanticCompressor
from wuerstchen_pl.pipelines.text_to_image import TextToImage
from wuerstchen_pl.sampling.config import SamplingConfig
from wuerstchen_pl.sampling.control import Control
from wuerstchen_pl.sampling.decoder import DecoderSampler
from wuerstchen_pl.sampling.diffusers_arguments import denoise_params
from wuerstchen_pl.sampling.images import (
    OUTPUT_TYPES,
    ImageInput,
    ImageOutput,
    OutputType,
    check_output_type,
    convert_output,
    pad_to,
    to_tensor,
)
from wuerstchen_pl.sampling.loop import DenoiseParams, LegacyCallback, StepCallback
from wuerstchen_pl.sampling.prior import PriorSampler
from wuerstchen_pl.sampling.prompts import Prompts, check_num_images, count_prompts


class CascadePipeline(TextToImage):
    """The cascade, from text to pixels.

    Args:
        prior: text to semantic latents; usable alone.
        decoder: semantic latents to images; usable alone.
        compressor: images to semantic latents; None for text to image only.
        source: path and hash of the checkpoint that the networks were loaded from.
        image_size: see ``TextToImage``.
    """

    show_progress = True

    def __init__(
        self,
        *,
        prior: PriorSampler,
        decoder: DecoderSampler,
        compressor: SemanticCompressor | None = None,
        source: Source | None = None,
        image_size: int | None = None,
    ) -> None:
        self.decoder, self.compressor = decoder, compressor
        super().__init__(
            prior=prior,
            vqgan=decoder.vqgan,
            placement=decoder.placement,
            source=source,
            image_size=image_size,
        )

    @property
    def modules(self) -> list[torch.nn.Module]:
        """The networks, in the order of their use."""
        parts = (
            self.prior.text_encoder, self.prior.controlnet, self.prior.prior,
            self.decoder.text_encoder, self.decoder.decoder, self.vqgan, self.compressor,
        )  # fmt: skip
        return [part for part in parts if part is not None]

    # Device, dtype and compilation

    def _compile(self, **options: Any) -> None:
        self.prior.compile(**options)
        self.decoder.compile(**options)

    # Text to images

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
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
        decoder_temperature: tuple[float, float] | None = None,
        image_embeddings: Tensor | None = None,
        strength: float = 1.0,
        mask: Tensor | None = None,
        control_image: ImageInput | Sequence[ImageInput] | None = None,
        control_scale: float = 1.0,
        progress: bool = True,
    ) -> Any:
        """Generate images; extends the arguments of diffusers' ``WuerstchenCombinedPipeline``.

        For arguments not listed here, see ``PriorSampler`` and ``DecoderSampler``, which have them
        without the prefixes ``prior_`` and ``decoder_``.

        Args:
            prompt: one, or a list of N; with ``seed`` or a list of generators, an image does not
                depend on the others of its batch.
            height: in pixels, ``default_side`` if None; if not a multiple of ``size_multiple``,
                rounded up and cropped.
            width: see ``height``.
            seed: alternative to ``generator``: one per image, or s for s, s + 1, ...
            image_embeddings: see ``PriorSampler``, as for ``strength`` and ``mask``.
            control_image: see ``control``.
            control_scale: see ``control``.

        Returns:
            N x ``num_images_per_prompt`` images.

        Raises:
            ValueError: if an argument is invalid.
        """
        check_output_type(output_type, OUTPUT_TYPES)
        height, width = self.size(height, width)
        padded_height, padded_width = self.padded_size_with_warning(height, width)
        prompts = Prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        num_images = count_prompts(prompts) * check_num_images(num_images_per_prompt)
        generator = resolve_generator(seed, generator, num_images)
        prior_params = denoise_params(
            num_inference_steps=prior_num_inference_steps,
            timesteps=prior_timesteps,
            guidance_scale=prior_guidance_scale,
            guidance_rescale=prior_guidance_rescale,
            guidance_interval=prior_guidance_interval,
            sampler=prior_sampler,
            generator=generator,
            callback_on_step_end=prior_callback_on_step_end,
            callback_on_step_end_tensor_inputs=prior_callback_on_step_end_tensor_inputs,
            callback=prior_callback,
            callback_steps=prior_callback_steps,
            progress_label="Stage C" if progress and self.show_progress else None,
        )
        decoder_params = denoise_params(
            num_inference_steps=num_inference_steps,
            timesteps=decoder_timesteps,
            guidance_scale=decoder_guidance_scale,
            guidance_rescale=decoder_guidance_rescale,
            guidance_interval=decoder_guidance_interval,
            temperature=decoder_temperature,
            sampler=decoder_sampler,
            generator=generator,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            callback=callback,
            callback_steps=callback_steps,
            progress_label="Stage B" if progress and self.show_progress else None,
        )
        self.decoder.check(decoder_params)  # before Stage C runs
        semantic = self.prior.sample(
            prompts,
            padded_height,
            padded_width,
            prior_params,
            num_images_per_prompt=num_images_per_prompt,
            latents=latents,
            image_embeddings=image_embeddings,
            strength=strength,
            mask=mask,
            control=self.control(control_image, control_scale, height, width),
        )
        texts = Prompts(prompt or "", negative_prompt)
        output = self.decoder.sample(semantic, texts, padded_height, padded_width, decoder_params)
        if output_type != "latent":
            output = self.decoder.decode_latents(output, height, width)
        images = convert_output(output, output_type)
        return ImageOutput(images) if return_dict else images

    def control(
        self,
        image: ImageInput | Sequence[ImageInput] | None,
        scale: float,
        height: int,
        width: int,
    ) -> Control | None:
        """What the ControlNet reads for images of a size.

        Args:
            image: one for all, or one per prompt or image, of any size. Edges and low resolutions
                are computed from it; other control images are used as they are.
            scale: strength; 1 is as trained, 0 changes nothing and needs no image.
            height: height of the generated images in pixels.
            width: width of the generated images in pixels.

        Raises:
            ValueError: if there is an image, but no ControlNet.
        """
        if scale == 0:
            return Control(None, scale)
        if image is None:
            return None
        images = to_tensor(image)
        images = F.interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
        if (controlnet := self.prior.controlnet) is not None:
            images = controlnet.control_images(images)
        return Control(pad_to(images, *self.padded_size(height, width)), scale)

    def _generate(
        self, prompts: Prompts, size: tuple[int, int], config: SamplingConfig,
        generator: Generator, control: Control | None,
    ) -> Tensor:  # fmt: skip
        prior_params = DenoiseParams(config=config.prior, generator=generator)
        decoder_params = DenoiseParams(config=config.decoder, generator=generator)
        self.decoder.check(decoder_params)  # before Stage C runs
        semantic = self.prior.sample(prompts, *size, prior_params, control=control)
        latents = self.decoder.sample(semantic, prompts, *size, decoder_params)
        return self.decoder.decode_latents(latents, *size)

    @property
    def size_multiple(self) -> int:
        """Number of pixels that heights and widths are multiples of: 128 as published.

        The least multiple of Stage B's that is a whole number of semantic positions.
        """
        multiple = self.vqgan.factor * self.decoder.decoder.size_multiple
        position = Fraction(self.prior.resolution_multiple).limit_denominator(8)  # 42.67 is 128 / 3
        return math.lcm(multiple * position.denominator, position.numerator) // position.denominator
