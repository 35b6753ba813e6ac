"""Prior preservation: an adapter learns its images, and other captions keep their meaning.

DreamBooth (Ruiz et al. 2022, arXiv 2208.12242) trains on images of the class that the base model
drew. Here the base model's own prediction is the target, which also needs no such images.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wuerstchen_pl.diffusion.objective import noise_error, p2_weight
from wuerstchen_pl.diffusion.schedule import sample_timesteps
from wuerstchen_pl.io.text_files import decode_text
from wuerstchen_pl.stages.batch_rng import BatchRNG
from wuerstchen_pl.transfer import to_device

if TYPE_CHECKING:
    from wuerstchen_pl.stages.text_conditional import TextConditionalStage

BATCH_SIZE = 16
"""Class images that are drawn at once."""


class PriorPreservation:
    """weight x p2(t) |prediction with the adapter - prediction without it|^2 for other captions.

    The noised latents are those of class images, or else of the training images, at times and with
    noise of their own.

    Args:
        captions: what should keep its meaning, such as ``[a dog]`` for images of ``my dog rex``;
            or a text file with one caption per line.
        weight: of this loss relative to that of the images.
        num_class_images: images that the base model draws of these captions before the first
            step, as latents; 0 uses the training images.
        image_size: side of the class images in pixels.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        *,
        captions: Sequence[str] | str,
        weight: float = 1.0,
        num_class_images: int = 0,
        image_size: int,
    ) -> None:
        if weight <= 0:
            raise ValueError(f"weight={weight} is out of range; use more than 0")
        if num_class_images < 0:
            raise ValueError(f"num_class_images={num_class_images} is out of range; use 0 or more")
        self.captions = _read(captions) if isinstance(captions, str) else list(captions)
        if not self.captions:
            raise ValueError(f"captions={captions} has no caption; give one or more")
        self.weight, self.num_class_images = weight, num_class_images
        self.image_size = image_size
        self._embeddings: Tensor | None = None
        self.class_images: Tensor | None = None

    @torch.no_grad()
    def draw_class_images(self, stage: "TextConditionalStage") -> None:
        """Draw the class images, the same for every process and whenever a run is resumed."""
        if not self.num_class_images:
            return
        size = (self.image_size, self.image_size)
        batches = []
        with _base_model(stage), stage.frozen.all_on(stage.device):
            for seeds in torch.arange(self.num_class_images).split(BATCH_SIZE):
                captions = [self.captions[seed % len(self.captions)] for seed in seeds]
                batches.append(stage.sample(captions, size=size, seeds=seeds.tolist()))
        self.class_images = stage.scaling.normalize(torch.cat(batches))

    def loss(self, stage: "TextConditionalStage", x0: Tensor, rng: BatchRNG) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            stage: with an adapter.
            x0: (B, S, h, w) latents of the training images in the denoiser's scale.
            rng: of the batch.
        """
        classes = len(self.captions)
        if self.class_images is None:
            which = (rng.uniform() * classes).long()
        else:
            rows = (rng.uniform() * self.num_class_images).long()
            x0, which = self.class_images[rows.to(x0.device)], rows % classes
        text = self._text(stage, which)
        t = to_device(sample_timesteps(rng.uniform()), x0.device)
        xt = stage.schedule.add_noise(x0, t, rng.noise(x0))
        with torch.no_grad(), _base_model(stage):
            target = stage.prior(xt, t, text)
        if "text_encoder" in stage.adapters:
            text = stage.text([self.captions[i] for i in which.tolist()])
        errors = noise_error(stage.prior(xt, t, text), target)
        return self.weight * (p2_weight(stage.schedule, t, stage.p2) * errors).mean()

    def _text(self, stage: "TextConditionalStage", which: Tensor) -> Tensor:
        """(B, L, D) embeddings of captions by the base model, or by a text encoder all of whose
        weights are trained; those of the base model are computed once.
        """
        if stage.trains_text and "text_encoder" not in stage.adapters:
            return stage.text([self.captions[i] for i in which.tolist()]).detach()
        if self._embeddings is None:
            with torch.no_grad(), _base_model(stage):
                self._embeddings = torch.cat([stage.text([caption]) for caption in self.captions])
        return self._embeddings[which.to(self._embeddings.device)]


@contextmanager
def _base_model(stage: "TextConditionalStage") -> Iterator[None]:
    """Within the block, the networks of a stage compute what the base model does."""
    with ExitStack() as adapters:
        for name, adapter in stage.adapters.items():
            adapters.enter_context(adapter.disabled(getattr(stage, name)))
        yield


def _read(path: str) -> list[str]:
    """The lines of a text file that are not empty."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"captions={path} is not a file; use a list such as [a dog], or a text file with one "
            "caption per line"
        )
    lines = decode_text(Path(path).read_bytes()).splitlines()
    return [line.strip() for line in lines if line.strip()]
