"""Text to images with the paper's baseline: one latent diffusion model and Stage A."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from wuerstchen_pl.checkpointing.load import load_stage
from wuerstchen_pl.diffusion.sampler import Generator, SamplerName
from wuerstchen_pl.models.vqgan import VQGAN
from wuerstchen_pl.pipelines.cascade import CascadePipeline
from wuerstchen_pl.sampling.device import DevicePlacement
from wuerstchen_pl.sampling.images import center_crop
from wuerstchen_pl.sampling.prior import PriorSampler


class StageADecoder:
    """Replaces ``DecoderSampler`` if there is no Stage B."""

    decoder = None
    text_encoder = None

    def __init__(self, vqgan: VQGAN, placement: DevicePlacement) -> None:
        self.vqgan, self.placement = vqgan, placement


class LatentDiffusionPipeline(CascadePipeline):
    """Pipeline of the baseline, with those features of a cascade that the commands use.

    Args:
        prior: text to Stage A's latents.
        vqgan: Stage A.
        source: ``path`` and ``sha256`` of the checkpoint that the networks were loaded from.
    """

    def __init__(
        self, *, prior: PriorSampler, vqgan: VQGAN, source: Mapping[str, str] | None = None
    ) -> None:
        decoder: Any = StageADecoder(vqgan, prior.placement)
        super().__init__(prior=prior, decoder=decoder, source=source)

    @classmethod
    def from_run(cls, run: str | Path) -> Self:
        """Load the model that a run of ``stage=ldm`` trained.

        Raises:
            FileNotFoundError: if there is no checkpoint.
            ValueError: if the checkpoint is of another stage, or damaged.
        """
        stage: Any = load_stage(run=run, stage="ldm")
        return cls(
            prior=stage.prior_sampler(),
            vqgan=stage.stage_a.vqgan,
            source=stage.provenance.source,
        )

    def compile(self, **options: Any) -> Self:
        """Compile the denoiser; ``options`` are ``torch.compile``'s."""
        self.prior.predict_noise = torch.compile(self.prior.predict_noise, **options)
        return self

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | Sequence[str],
        height: int = 512,
        width: int = 512,
        *,
        prior_num_inference_steps: int = 60,
        prior_timesteps: Sequence[float] | None = None,
        prior_guidance_scale: float = 4.0,
        prior_guidance_rescale: float = 0.0,
        prior_guidance_interval: tuple[float, float] = (0.0, 1.0),
        prior_sampler: SamplerName = "ddpm",
        generator: Generator = None,
        seed: int | Sequence[int] | None = None,
        progress: bool = True,
        num_inference_steps: int = 12,
        decoder_guidance_scale: float = 0.0,
        decoder_sampler: SamplerName = "ddpm",
        output_type: str = "pt",
        return_dict: bool = False,
    ) -> Tensor:
        """Generate images; see ``CascadePipeline``. The last five arguments have no effect.

        Returns:
            (N, 3, height, width) in [0, 1].
        """
        padded_height, padded_width = self.padded_size(height, width)
        latents = self.prior(
            prompt,
            padded_height,
            padded_width,
            num_inference_steps=prior_num_inference_steps,
            timesteps=prior_timesteps,
            guidance_scale=prior_guidance_scale,
            guidance_rescale=prior_guidance_rescale,
            guidance_interval=prior_guidance_interval,
            sampler=prior_sampler,
            generator=generator,
            seed=seed,
            progress=progress,
        )[0]
        with self.placement.on_device(self.decoder.vqgan):
            images = self.decoder.vqgan.decode(latents).clamp(0, 1)
        return center_crop(images, height, width)

    @property
    def size_multiple(self) -> int:
        """Number of pixels that heights and widths are multiples of."""
        return self.decoder.vqgan.factor * self.prior.prior.size_multiple
