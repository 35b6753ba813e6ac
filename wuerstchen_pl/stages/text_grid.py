"""The sample grid of a text-conditional stage."""

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from wuerstchen_pl.batch import Batch
from wuerstchen_pl.diffusion.sampler import generators_from_seeds, randn
from wuerstchen_pl.distributed.fsdp2 import unsharded

if TYPE_CHECKING:
    from wuerstchen_pl.stages.text_conditional import TextConditionalStage


@torch.no_grad()
def text_grid(stage: "TextConditionalStage", batch: Batch) -> dict[str, Tensor]:
    """Original, noised, one-step x0 prediction (EMA), samples with raw and EMA weights.

    With a cache, which has no images, the first column shows the decoded latents.
    """
    captions, x0 = batch["caption"], stage.latents(batch)
    size = tuple(batch["image"].shape[-2:]) if "image" in batch else batch["size"]
    seeds = range(len(x0))
    t = torch.full((len(x0),), 0.5, device=x0.device)
    noise = randn(x0.shape, generators_from_seeds(seeds), x0.device)
    xt = stage.schedule.add_noise(x0, t, noise)

    def decoded(semantic: Tensor) -> Tensor:
        return stage.decode_semantic(
            semantic, size=cast(tuple[int, int], size), seeds=seeds, captions=captions
        )

    def sampled() -> Tensor:
        return decoded(
            stage.sample(captions, size=cast(tuple[int, int], size), seeds=seeds, num_steps=20)
        )

    with unsharded(stage):
        raw = sampled()
    with stage.ema.applied(stage):
        pred = stage.prior(xt, t, stage.text(captions))
        with_ema = sampled()
    denoised = stage.schedule.predict_x0(xt, t, pred)
    return {
        "original": (
            batch["image"] if "image" in batch else decoded(stage.scaling.denormalize(x0))
        ),
        "noised, t=0.5": decoded(stage.scaling.denormalize(xt)),
        "one step (EMA)": decoded(stage.scaling.denormalize(denoised)),
        "sample": raw,
        "sample (EMA)": with_ema,
    }
