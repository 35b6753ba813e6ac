"""Stage C with a ControlNet: the prior is that of a base model, and stays as it is."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from wuerstchen_pl.batch import Batch
from wuerstchen_pl.diffusion.sampler import generators_from_seeds
from wuerstchen_pl.models.control_images import NUM_UNIFORM
from wuerstchen_pl.models.controlnet import ControlNet
from wuerstchen_pl.models.prior import Prior
from wuerstchen_pl.sampling.control import Control
from wuerstchen_pl.sampling.prior import PriorSampler
from wuerstchen_pl.stages.batch_rng import BatchRNG, derive_seed
from wuerstchen_pl.stages.c import StageC
from wuerstchen_pl.stages.frozen_base import freeze_base
from wuerstchen_pl.transfer import to_device


class ControlNetStage(StageC):
    """Trains a ControlNet, which starts with the backbone of the compressor.

    Args:
        controlnet: reads control images, and steers the prior.
        prior: the denoiser, with the weights of a base model.
        arguments: of ``StageC``; none that trains something else.

    Raises:
        ValueError: if an argument does not fit; see ``ControlNet``.
    """

    def __init__(self, *, controlnet: ControlNet, prior: Prior, **arguments: Any) -> None:
        if prior.source is None:
            raise ValueError(
                "a ControlNet needs the weights of a base model; set preset=base and init_from"
            )
        for key in ("adapter", "text_adapter", "words", "train_text_encoder"):
            if arguments.get(key):
                raise ValueError(
                    f"a ControlNet is trained alone, without {key}; remove stage.{key}"
                )
        super().__init__(prior=prior, **arguments)
        freeze_base(self, "prior")
        controlnet.check_prior(prior)
        controlnet.copy_backbone(self.stage_b.compressor)
        self.controlnet = controlnet

    def check_checkpoint(self, checkpoint: Mapping[str, Any], *, origin: str = "ckpt") -> None:
        """See ``Stage``; also refuse a checkpoint that was trained on other control images."""
        super().check_checkpoint(checkpoint, origin=origin)
        key = "control_images"
        saved, now = (
            ((config or {}).get("controlnet") or {}).get(key)
            for config in (checkpoint["stage"], self.provenance.config)
        )
        if saved != now:
            raise ValueError(
                f"{origin} was trained with {key} {saved}, and now they are {now}; use the former, "
                "or start a new run"
            )

    def control(self, batch: Batch, rng: BatchRNG | None = None) -> Control:
        """Control images of a batch; random ones depend on its ``rng``, or else on its keys.

        Raises:
            ValueError: if the batch has no images of the kind that is needed.
        """
        kind = self.controlnet.control_images
        name = "control" if kind.from_files else "image"
        if name not in batch:
            raise ValueError(f"a batch has no {name!r}, which the ControlNet needs")
        images = cast(Tensor, batch[name])  # type: ignore[literal-required]
        uniform = _uniform(batch) if rng is None else rng.uniform(NUM_UNIFORM)
        return Control(kind.of_training(images, to_device(uniform, images.device)))

    def predict(self, xt: Tensor, t: Tensor, text: Tensor, control: Control | None) -> Tensor:
        """The prediction of the noise."""
        images = cast(Tensor, cast(Control, control).images)
        return self.prior(xt, t, text, self.controlnet(images, (xt.shape[2], xt.shape[3])))

    def prior_sampler(self) -> PriorSampler:
        """The sampler that uses this stage's weights."""
        sampler = super().prior_sampler()
        sampler.controlnet = self.controlnet
        return sampler


def _uniform(batch: Batch) -> Tensor:
    seeds = [derive_seed("control", key) for key in batch["key"]]
    return torch.stack([torch.rand(NUM_UNIFORM, generator=g) for g in generators_from_seeds(seeds)])
