"""Text to semantic latents: sampling with Stage C (arXiv 2306.00637, section 3.3)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from wuerstchen_pl.diffusion.latent_scaling import LatentScaling
from wuerstchen_pl.diffusion.sampler import (
    Generator,
    SamplerName,
    randn,
    resolve_generator,
)
from wuerstchen_pl.diffusion.schedule import CosineSchedule
from wuerstchen_pl.models.conditioning import CachedConditioning, Residuals
from wuerstchen_pl.models.controlnet import ControlNet
from wuerstchen_pl.models.prior import Prior
from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.sampling.control import Control, control_residuals
from wuerstchen_pl.sampling.device import DevicePlacement
from wuerstchen_pl.sampling.diffusers_arguments import denoise_params
from wuerstchen_pl.sampling.images import OutputTuple, check_output_type
from wuerstchen_pl.sampling.initial_latents import (
    InitLatents,
    expand_rows,
    initial_noise,
    noised,
    times_from,
)
from wuerstchen_pl.sampling.loop import (
    NEGATIVE,
    TEXT,
    DenoiseParams,
    LegacyCallback,
    StepCallback,
    StepState,
    continuous_solver,
    denoise,
)
from wuerstchen_pl.sampling.prompts import Prompts, check_num_images, count_prompts, encode_prompts
from wuerstchen_pl.sampling.student import check_student_steps, warn_if_unsuitable

DEFAULT_STAGE_C_TIMESTEPS: list[float] = [
    *(1 - i / 57 for i in range(20)),
    *((10 - i) / 15 for i in range(1, 11)),
]
"""The published 29 steps: 19 from 1 to 2/3, and 10 from there to 0."""


class _PriorOutput(NamedTuple):
    image_embeddings: Any


class PriorOutput(OutputTuple, _PriorOutput):
    """(B, S, h, w) semantic latents in the compressor's scale."""


class PriorSampler(StepState):
    """Samples semantic latents from text.

    Args:
        prior: the denoiser.
        text_encoder: maps prompts to text embeddings.
        semantic_scale: ``scale`` of ``LatentScaling`` (v2: 42).
        semantic_shift: ``shift`` of ``LatentScaling`` (v2: 1).
        resolution_multiple: pixels per semantic position (v1, v2: 42.67).
        placement: the device to run on; the CPU if None.
        controlnet: then every run needs control images; None without one.
        student_steps: of a distilled prior; None for another one.
    """

    part = "prior"
    CALLBACK_INPUTS = ("latents", "text_encoder_hidden_states", "negative_prompt_embeds")

    def __init__(
        self,
        *,
        prior: Prior,
        text_encoder: TextEncoder,
        semantic_scale: float = 42.0,
        semantic_shift: float = 1.0,
        resolution_multiple: float = 42.67,
        placement: DevicePlacement | None = None,
        controlnet: ControlNet | None = None,
        student_steps: float | None = None,
    ) -> None:
        self.student_steps = None if student_steps is None else check_student_steps(student_steps)
        self.prior, self.text_encoder, self.controlnet = prior, text_encoder, controlnet
        self.scaling = LatentScaling(scale=semantic_scale, shift=semantic_shift)
        self.resolution_multiple = resolution_multiple
        self.schedule = CosineSchedule()
        self.placement = placement or DevicePlacement()
        self.predict_noise = prior.predict_noise

    def share_placement(self, placement: DevicePlacement) -> None:
        """Run where the other networks of a pipeline run."""
        self.placement = placement

    def compile(self, **options: Any) -> None:
        """Compile the denoiser; ``options`` are ``torch.compile``'s."""
        self.predict_noise = torch.compile(self.predict_noise, **options)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int = 1024,
        width: int = 1024,
        num_inference_steps: int = 60,
        timesteps: Sequence[float] | None = None,
        guidance_scale: float = 8.0,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        num_images_per_prompt: int = 1,
        generator: Generator = None,
        latents: Tensor | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        seed: int | Sequence[int] | None = None,
        sampler: SamplerName = "ddpm",
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        image_embeddings: Tensor | None = None,
        strength: float = 1.0,
        mask: Tensor | None = None,
        control: Control | None = None,
        callback: LegacyCallback | None = None,
        callback_steps: int = 1,
        progress: bool = True,
    ) -> PriorOutput | tuple[Any]:
        """Generate latents; extends the arguments of diffusers' ``WuerstchenPriorPipeline``.

        Args:
            prompt: one or several.
            height: height of the image in pixels.
            width: width of the image in pixels.
            num_inference_steps: denoising steps (paper: 60).
            timesteps: decreasing times in [0, 1] instead of equal steps.
            guidance_scale: away from the negative prompt; values up to 1 turn it off.
            negative_prompt: one, or one per prompt; empty if not given.
            prompt_embeds: (N, L, D) text embeddings instead of ``prompt``.
            negative_prompt_embeds: (N, L, D) text embeddings instead of ``negative_prompt``.
            num_images_per_prompt: images per prompt.
            generator: one for the whole batch, or a list with one per image.
            latents: (B, S, h, w) noise to start from.
            output_type: ``pt``, ``latent`` (the same) or ``np``.
            return_dict: False returns a tuple.
            callback_on_step_end: called after each step as (pipeline, step, time, tensors); returns
                the tensors that it changed.
            callback_on_step_end_tensor_inputs: names of the tensors passed to it.
            seed: alternative to ``generator``: one per image, or s for s, s + 1, ...
            sampler: ``ddpm``, ``ddim``, ``dpmpp_2m`` or ``dpmpp_2m_sde``.
            guidance_rescale: see ``diffusion.guidance.Guidance``.
            guidance_interval: see ``guidance_rescale``.
            image_embeddings: (B, S, h, w) or (1, S, h, w) semantic latents to start from, noised to
                the time ``strength``.
            strength: in [0, 1]; 0 returns ``image_embeddings`` unchanged.
            mask: (B, 1, h, w) or (1, 1, h, w), 1 where ``image_embeddings`` are generated again.
            control: what the ControlNet reads.
            callback: diffusers' deprecated callback (step, time, latents).
            callback_steps: steps between two calls of ``callback``.
            progress: show a progress bar.

        Returns:
            (B, S, h, w) semantic latents, in the compressor's scale.

        Raises:
            ValueError: if an argument is invalid.
        """
        check_output_type(output_type, ("pt", "np", "latent"))
        prompts = Prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        num_images = count_prompts(prompts) * check_num_images(num_images_per_prompt)
        params = denoise_params(
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            guidance_interval=guidance_interval,
            sampler=sampler,
            generator=resolve_generator(seed, generator, num_images),
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            callback=callback,
            callback_steps=callback_steps,
            progress_label="Stage C" if progress else None,
        )
        semantic = self.sample(
            prompts,
            height,
            width,
            params,
            num_images_per_prompt=num_images_per_prompt,
            latents=latents,
            image_embeddings=image_embeddings,
            strength=strength,
            mask=mask,
            control=control,
        )
        output = semantic.cpu().numpy() if output_type == "np" else semantic
        return PriorOutput(output) if return_dict else (output,)

    @torch.no_grad()
    def sample(
        self,
        prompts: Prompts,
        height: int,
        width: int,
        params: DenoiseParams,
        *,
        num_images_per_prompt: int = 1,
        latents: Tensor | None = None,
        image_embeddings: Tensor | None = None,
        strength: float = 1.0,
        mask: Tensor | None = None,
        control: Control | None = None,
    ) -> Tensor:
        """Generate semantic latents; see ``__call__`` for the arguments.

        Returns:
            (B, S, h, w) in the compressor's scale.

        Raises:
            ValueError: if an argument is invalid.
        """
        if image_embeddings is None and (strength != 1 or mask is not None):
            raise ValueError("strength and mask need image_embeddings; give them")
        params.check(self.CALLBACK_INPUTS)
        if self.student_steps is not None:
            warn_if_unsuitable(self.student_steps, params.config)
        times = times_from(strength, params.config.times)
        params = replace(params, config=replace(params.config, times=times))
        guided = params.config.guidance.on
        text = self._text(prompts, num_images_per_prompt, guided=guided)
        rows = len(text) // (2 if guided else 1)
        shape = (rows, self.prior.latent_channels, *self.latent_size(height, width))
        noise = initial_noise(shape, latents, params.generator, text.device)
        init = None
        if image_embeddings is not None:
            start = expand_rows(image_embeddings.to(noise), shape, "image_embeddings")
            if mask is not None:
                mask = expand_rows(mask.to(noise), (rows, 1, *shape[2:]), "mask")
            init = InitLatents(self.scaling.normalize(start), mask)
        residuals = control_residuals(
            self.controlnet, control, rows=rows, size=(shape[2], shape[3]), placement=self.placement
        )
        return self.scaling.denormalize(self._denoise(noise, text, init, residuals, params))

    def _text(self, prompts: Prompts, repeats: int, *, guided: bool) -> Tensor:
        with self.placement.on_device(self.text_encoder):
            text = encode_prompts(self.text_encoder, prompts, repeats=repeats, guided=guided)
        return text.to(self.placement.device)

    def _denoise(
        self, noise: Tensor, text: Tensor, init: InitLatents | None, residuals: Residuals | None,
        params: DenoiseParams,
    ) -> Tensor:  # fmt: skip
        """Latents at the last time, from noise or from initial latents noised to the first time."""
        steps = torch.tensor(params.config.times[:-1], device=noise.device)

        def cache_conditioning(tensors: Mapping[str, Tensor]) -> list[CachedConditioning]:
            if residuals is None:
                return self.prior.cache_conditioning(steps, tensors[TEXT])
            return self.prior.cache_conditioning(steps, tensors[TEXT], residuals)

        def keep_unmasked(x: Tensor, t: float) -> Tensor:
            if init is None or init.mask is None:
                return x
            fresh = randn(x.shape, params.generator, x.device)
            return torch.lerp(noised(self.schedule, init.latents, t, fresh), x, init.mask)

        tensors = {TEXT: text}
        if params.config.guidance.on:
            tensors[NEGATIVE] = text[len(noise) :]
        start = params.config.times[0]
        x = noise if init is None else noised(self.schedule, init.latents, start, noise)
        with self.placement.on_device(self.prior):
            return denoise(
                self.predict_noise, cache_conditioning, x, tensors, params,
                sampler=self, solver=continuous_solver(params, self.schedule),
                latents_hook=keep_unmasked,
            )  # fmt: skip

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Size (h, w) of an image's semantic latents: 24 x 24 for 1024 px as published."""
        multiple = self.resolution_multiple
        # 1024 / 42.666... may round to a little more than 24
        return math.ceil(height / multiple - 1e-6), math.ceil(width / multiple - 1e-6)

    def mask_for(self, mask: Tensor, height: int, width: int) -> Tensor:
        """(B, 1, H, W) in [0, 1] -> (B, 1, h, w), the maximum over each position's pixels."""
        return F.adaptive_max_pool2d(mask, self.latent_size(height, width))
