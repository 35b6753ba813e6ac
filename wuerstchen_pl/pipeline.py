"""Prompts to pictures: the one sampler that sample, evaluate and the demo share."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Self, cast

import torch
from torch import Tensor

from wuerstchen_pl.checkpoint import load_stage
from wuerstchen_pl.diffusion.sampler import Method
from wuerstchen_pl.models.vqgan import codebook_use
from wuerstchen_pl.stages.c import StageC


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How pictures are drawn.

    Raises:
        ValueError: if a number is out of its range.
    """

    prior_steps: int = 30
    """Denoising steps of Stage C (paper: 60)."""
    prior_guidance_scale: float = 4.0
    """Away from the empty caption; 1 is none."""
    decoder_steps: int = 12
    """Denoising steps of Stage B (paper: 12)."""
    decoder_guidance_scale: float = 1.0
    """Towards the semantic latents; 1 is none."""
    sampler: Method = "ddpm"
    """``ddpm`` or ``ddim``, in both stages."""
    batch_size: int = 16
    """Pictures drawn at once; it changes the speed and no picture."""

    def __post_init__(self) -> None:
        for key in ("prior_steps", "decoder_steps", "batch_size"):
            value = getattr(self, key)
            if not isinstance(value, int) or not 1 <= value <= 10_000:
                raise ValueError(f"{key}={value!r} is out of range; use 1 to 10000")
        for key in ("prior_guidance_scale", "decoder_guidance_scale"):
            value = getattr(self, key)
            if not isinstance(value, int | float) or not 0 <= value <= 100:
                raise ValueError(f"{key}={value!r} is out of range; use 0 to 100")
        if self.sampler not in ("ddpm", "ddim"):
            raise ValueError(f"sampler={self.sampler!r} is unknown; use ddpm or ddim")


class WuerstchenPipeline:
    """The three trained stages, from text to pixels.

    Args:
        stage_c: a loaded Stage C; it holds B, which holds A.
        bf16: run the networks in bfloat16.
    """

    def __init__(self, stage_c: StageC, *, bf16: bool = False) -> None:
        self.stage_c = stage_c.eval()
        self.stage_b = stage_c.decoder
        self.stage_a = stage_c.decoder.decoder
        self.bf16 = bf16

    @classmethod
    def from_pretrained(cls, path: str, *, device: str = "cpu", bf16: bool = False) -> Self:
        """Load Stage C's run folder or checkpoint, and the stages that it was trained over."""
        stage = cast(StageC, load_stage(run=path, stage="c"))
        return cls(stage.to(device), bf16=bf16)

    def check(self, prompts: Sequence[str], height: int, width: int) -> None:
        """Refuse what cannot be drawn, before anything is.

        Raises:
            ValueError: for a prompt that cannot be read or a size that the stages cannot divide.
        """
        multiple = self.stage_c.size_multiple
        for key, value in (("height", height), ("width", width)):
            if not multiple <= value <= MAX_SIDE or value % multiple:
                nearest = min(max(round(value / multiple), 1) * multiple, MAX_SIDE)
                raise ValueError(
                    f"{key}={value} cannot be drawn; use a multiple of {multiple} from {multiple} "
                    f"to {MAX_SIDE // multiple * multiple}, such as {nearest}"
                )
        for prompt in prompts:
            self.stage_c.text_encoder.check(prompt)

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        height: int,
        width: int,
        settings: Settings | None = None,
    ) -> Iterator[Tensor]:
        """Draw one picture for each prompt, in order.

        Args:
            prompts: N of them.
            seeds: N; a prompt, a seed and a size give the same picture whatever the batch.
            height: in pixels, a multiple of ``stage_c.size_multiple``.
            width: likewise.
            settings: steps, guidance, sampler.

        Yields:
            (3, height, width) float32 in [0, 1].
        """
        how = settings or Settings()
        self.check(prompts, height, width)
        for start in range(0, len(prompts), how.batch_size):
            part = slice(start, start + how.batch_size)
            with self._precision():
                semantic = self.stage_c.sample(
                    prompts[part],
                    size=(height, width),
                    seeds=seeds[part],
                    num_steps=how.prior_steps,
                    guidance_scale=how.prior_guidance_scale,
                    method=how.sampler,
                )
                pictures = self.stage_b.decode(
                    semantic,
                    size=(height, width),
                    seeds=seeds[part],
                    captions=prompts[part],
                    num_steps=how.decoder_steps,
                    guidance_scale=how.decoder_guidance_scale,
                    method=how.sampler,
                )
            yield from pictures.float().cpu()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, S, h, w) semantic latents."""
        with self._precision():
            return self.stage_b.encode(images.to(self.stage_c.device))

    @torch.no_grad()
    def reconstruct(self, images: Tensor, *, stage: str, decoder_steps: int = 12) -> Tensor:
        """Pictures through Stage A alone, or through compressor, B and A.

        Args:
            images: (B, 3, H, W) in [0, 1].
            stage: ``a`` or ``b``.
            decoder_steps: denoising steps of Stage B.

        Returns:
            (B, 3, H, W) in [0, 1].
        """
        images = images.to(self.stage_c.device)
        with self._precision():
            if stage == "a":
                return self.stage_a.reconstruct(images).float().cpu()
            seeds = range(len(images))
            back = self.stage_b.reconstruct(images, seeds=seeds, num_steps=decoder_steps)
        return back.float().cpu()

    @torch.no_grad()
    def codebook_use(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """Pictures, (B, 3, H, W) in [0, 1] each -> perplexity, dead codes and size of the book."""
        quantizer = self.stage_a.vqgan.quantizer
        uses = torch.zeros(quantizer.codebook.num_embeddings)
        for images in batches:
            with self._precision():
                features = self.stage_a.vqgan.features(images.to(self.stage_c.device))
            indices = quantizer.indices(features).flatten().cpu()
            uses += torch.bincount(indices, minlength=len(uses))
        perplexity, dead = codebook_use(uses)
        return {"perplexity": float(perplexity), "dead": float(dead), "codes": len(uses)}

    def _precision(self) -> AbstractContextManager:
        return torch.autocast(self.stage_c.device.type, torch.bfloat16, enabled=self.bf16)


MAX_SIDE = 4096
"""Longest side in pixels: twice what the published model was shown."""
