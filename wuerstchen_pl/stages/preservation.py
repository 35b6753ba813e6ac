"""Prior preservation: an adapter learns its images, and a related caption keeps its meaning.

DreamBooth (Ruiz et al. 2022, arXiv 2208.12242) has images of the class drawn by the base model, and
trains on them. Here the base model's own prediction is the target, which needs no such images.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from wuerstchen_pl.diffusion.objective import noise_error, p2_weight
from wuerstchen_pl.diffusion.schedule import sample_timesteps
from wuerstchen_pl.stages.batch_rng import BatchRNG
from wuerstchen_pl.transfer import to_device

if TYPE_CHECKING:
    from wuerstchen_pl.stages.text_conditional import TextConditionalStage


class PriorPreservation:
    """weight x p2(t) |prediction with the adapter - prediction without it|^2 for a caption.

    The noised latents are those of the training images, at times and with noise of their own.

    Args:
        caption: the class of the images, such as ``a dog`` for images of ``my dog rex``.
        weight: of this loss relative to that of the images.
    """

    def __init__(self, *, caption: str, weight: float = 1.0) -> None:
        if weight <= 0:
            raise ValueError(f"weight={weight} is out of range; use more than 0")
        self.caption, self.weight = caption, weight
        self._embedding: Tensor | None = None

    def loss(self, stage: "TextConditionalStage", x0: Tensor, rng: BatchRNG) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            stage: with an adapter.
            x0: (B, S, h, w) latents in the denoiser's scale.
            rng: of the batch.
        """
        prior, adapter = cast(Any, stage.prior), cast(Any, stage.adapter)
        text = self._text(stage).expand(len(x0), -1, -1)
        t = to_device(sample_timesteps(rng.uniform()), x0.device)
        xt = stage.schedule.add_noise(x0, t, rng.noise(x0))
        with torch.no_grad(), adapter.disabled(prior):
            target = prior(xt, t, text)
        errors = noise_error(prior(xt, t, text), target)
        return self.weight * (p2_weight(stage.schedule, t, stage.p2) * errors).mean()

    def _text(self, stage: "TextConditionalStage") -> Tensor:
        """(1, L, D) embedding of the caption, computed once unless the text encoder is trained."""
        if stage.train_text_encoder:
            return stage.text([self.caption]).detach()
        if self._embedding is None:
            self._embedding = stage.text([self.caption])
        return self._embedding
