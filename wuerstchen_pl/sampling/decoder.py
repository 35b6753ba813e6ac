"""Semantic latents to images with Stage B and Stage A (arXiv 2306.00637, sections 3.1, 3.2)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from wuerstchen_pl.diffusion.sampler import (
    Generator,
    SamplerName,
    resolve_generator,
)
from wuerstchen_pl.models.diffnext import DiffNeXt
from wuerstchen_pl.models.paella import Paella
from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.models.vqgan import VQGAN
from wuerstchen_pl.plural import plural
from wuerstchen_pl.sampling.device import DevicePlacement
from wuerstchen_pl.sampling.diffusers_arguments import denoise_params
from wuerstchen_pl.sampling.images import (
    OUTPUT_TYPES,
    ImageOutput,
    OutputType,
    center_crop,
    check_output_type,
    convert_output,
)
from wuerstchen_pl.sampling.loop import (
    NEGATIVE,
    TEXT,
    DenoiseParams,
    LegacyCallback,
    PredictNoise,
    StepCallback,
    StepState,
)
from wuerstchen_pl.sampling.prompts import Prompts, check_num_images, encode_prompts


class DecoderSampler(StepState, ABC):
    """Samples images from semantic latents; a subclass generates Stage A's latents.

    Args:
        decoder: Stage B's network.
        vqgan: Stage A.
        text_encoder: for a Stage B that reads text.
        latent_dim_scale: Stage A latents per semantic position, along a side (v1, v2: 10.67).
        placement: the device to run on; the CPU if None.

    Raises:
        ValueError: if only one of the denoiser's ``text_dim`` and ``text_encoder`` is set.
    """

    part = "decoder"
    predict: PredictNoise
    CALLBACK_INPUTS = (
        "latents", "text_encoder_hidden_states", "negative_prompt_embeds", "image_embeddings",
    )  # fmt: skip

    def __init__(
        self,
        *,
        decoder: DiffNeXt | Paella,
        vqgan: VQGAN,
        text_encoder: TextEncoder | None = None,
        latent_dim_scale: float = 10.67,
        placement: DevicePlacement | None = None,
    ) -> None:
        if (text_encoder is None) != (decoder.text_dim is None):
            raise ValueError(
                f"the decoder has text_dim={decoder.text_dim} and text_encoder is "
                f"{'missing' if text_encoder is None else 'given'}; give both or neither"
            )
        self.decoder, self.vqgan, self.text_encoder = decoder, vqgan, text_encoder
        self.latent_dim_scale = latent_dim_scale
        self.placement = placement or DevicePlacement()
        self.decode = vqgan.decode

    def compile(self, **options: Any) -> None:
        """Compile the network and Stage A's decoder; ``options`` are ``torch.compile``'s."""
        self.predict = torch.compile(self.predict, **options)
        self.decode = torch.compile(self.decode, **options)

    @torch.no_grad()
    def __call__(
        self,
        image_embeddings: Tensor | np.ndarray | Sequence[Tensor],
        prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 12,
        timesteps: Sequence[float] | None = None,
        guidance_scale: float = 0.0,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generator = None,
        latents: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        size: tuple[int, int] | None = None,
        seed: int | Sequence[int] | None = None,
        sampler: SamplerName = "ddpm",
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        temperature: tuple[float, float] | None = None,
        callback: LegacyCallback | None = None,
        callback_steps: int = 1,
        progress: bool = True,
    ) -> Any:
        """Generate images; extends the arguments of diffusers' ``WuerstchenDecoderPipeline``.

        Args:
            image_embeddings: (N, S, h, w) semantic latents in the compressor's scale, or a list of
                such batches.
            prompt: one, N, or a number that divides N; empty if not given.
            num_inference_steps: denoising steps (paper: 12).
            timesteps: decreasing times in [0, 1] instead of equal steps.
            guidance_scale: toward semantic latents and prompt; values up to 1 turn it off.
            negative_prompt: one, or one per prompt; empty if not given.
            num_images_per_prompt: images for each of the N.
            generator: one for the whole batch, or a list with one per image.
            latents: what to start from: noise (B, C, H / 4, W / 4), or for version 1's Stage B
                tokens (B, H / 4, W / 4).
            output_type: ``pil``, ``np``, ``pt``, or ``latent`` for Stage A's latents.
            return_dict: False returns only the images.
            callback_on_step_end: called after each step as (pipeline, step, time, tensors); returns
                the tensors that it changed.
            callback_on_step_end_tensor_inputs: names of the tensors passed to it.
            size: (height, width) in pixels; that of the semantic latents if not given.
            seed: alternative to ``generator``: one per image, or s for s, s + 1, ...
            sampler: ``ddpm``, ``ddim``, ``dpmpp_2m`` or ``dpmpp_2m_sde``.
            guidance_rescale: see ``diffusion.guidance.Guidance``.
            guidance_interval: see ``guidance_rescale``.
            temperature: of version 1's Stage B at the first and at the last step.
            callback: diffusers' deprecated callback (step, time, latents).
            callback_steps: steps between two calls of ``callback``.
            progress: show a progress bar.

        Returns:
            Images in [0, 1]; sizes that Stage B cannot divide are generated larger and cropped.

        Raises:
            ValueError: if an argument is invalid.
        """
        check_output_type(output_type, OUTPUT_TYPES)
        semantic = self._semantic(image_embeddings, num_images_per_prompt)
        params = denoise_params(
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            guidance_interval=guidance_interval,
            temperature=temperature,
            sampler=sampler,
            generator=resolve_generator(seed, generator, len(semantic)),
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            callback=callback,
            callback_steps=callback_steps,
            progress_label="Stage B" if progress else None,
        )
        height, width = size or self.size(semantic.shape[-2], semantic.shape[-1])
        prompts = Prompts(prompt or "", negative_prompt)
        output = self.sample(semantic, prompts, height, width, params, latents=latents)
        if output_type != "latent":
            output = self.decode_latents(output, height, width)
        images = convert_output(output, output_type)
        return ImageOutput(images) if return_dict else images

    def check(self, params: DenoiseParams) -> None:
        """Reject parameters that would otherwise fail only when they are used.

        Raises:
            ValueError: if a callback asks for an unknown tensor, or a parameter is for the other
                version of Stage B.
        """
        params.check(self.CALLBACK_INPUTS)

    @torch.no_grad()
    def sample(
        self,
        semantic: Tensor,
        prompts: Prompts,
        height: int,
        width: int,
        params: DenoiseParams,
        *,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Generate Stage A's latents.

        Args:
            semantic: (B, S, h, w) semantic latents in the compressor's scale.
            prompts: one, B, or a number that divides B; ignored by a Stage B without text.
            height: in pixels.
            width: in pixels.
            params: parameters of the denoising loop.
            latents: what to start from; see ``__call__``.

        Returns:
            (B, C, H, W).

        Raises:
            ValueError: if an argument is invalid.
        """
        self.check(params)
        tensors, guided = {"image_embeddings": semantic}, params.config.guidance.on
        if self.text_encoder is not None:
            text = self._text(prompts, len(semantic), guided=guided)
            tensors[TEXT] = text
            if guided:
                tensors[NEGATIVE] = text[len(semantic) :]
        return self._generate(self.latent_grid(height, width), tensors, params, latents)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Stage A's latents -> (B, 3, height, width) in [0, 1]."""
        with self.placement.on_device(self.vqgan):
            return center_crop(self.decode(latents).clamp(0, 1), height, width)

    @abstractmethod
    def _generate(
        self,
        grid: tuple[int, int],
        tensors: dict[str, Tensor],
        params: DenoiseParams,
        latents: Tensor | None,
    ) -> Tensor:
        """Stage A's latents of size ``grid``, from conditioning tensors by name.

        Raises:
            ValueError: if ``latents`` are for the other version of Stage B.
        """

    def guided_semantic(self, tensors: Mapping[str, Tensor], params: DenoiseParams) -> Tensor:
        """The semantic latents, with zeros as the unconditional ones if ``params`` guide."""
        semantic = tensors["image_embeddings"]
        if not params.config.guidance.on:
            return semantic
        return torch.cat([semantic, torch.zeros_like(semantic)])

    def size(self, h: int, w: int) -> tuple[int, int]:
        """Size (height, width) in pixels of the image that has (h, w) semantic latents."""
        height, width = (int(side * self.latent_dim_scale + 1e-6) for side in (h, w))
        return height * self.vqgan.factor, width * self.vqgan.factor

    def latent_grid(self, height: int, width: int) -> tuple[int, int]:
        """Size (H, W) of Stage A's latents that cover an image and that Stage B can divide."""
        multiple = self.decoder.size_multiple
        pixels = self.vqgan.factor * multiple
        return math.ceil(height / pixels) * multiple, math.ceil(width / pixels) * multiple

    def _semantic(self, embeddings: Any, repeats: int) -> Tensor:
        batches = embeddings if isinstance(embeddings, list | tuple) else [embeddings]
        semantic = torch.cat([torch.as_tensor(batch) for batch in batches])
        channels = self.decoder.semantic_channels
        if semantic.ndim != 4 or semantic.shape[1] != channels:
            raise ValueError(
                f"image_embeddings have shape {tuple(semantic.shape)}; use (N, {channels}, h, w)"
            )
        semantic = semantic.to(self.placement.device, torch.float32)
        return semantic.repeat_interleave(check_num_images(repeats), dim=0)

    def _text(self, prompts: Prompts, rows: int, *, guided: bool) -> Tensor:
        encoder = cast(TextEncoder, self.text_encoder)
        num_prompts = 1 if isinstance(prompts.prompt, str) else len(prompts.prompt or ())
        if not num_prompts or rows % num_prompts:
            raise ValueError(
                f"{plural(num_prompts, 'prompt')} for {plural(rows, 'image')}; give one per image, "
                "or one for all"
            )
        with self.placement.on_device(encoder):
            text = encode_prompts(encoder, prompts, repeats=rows // num_prompts, guided=guided)
        return text.to(self.placement.device)
