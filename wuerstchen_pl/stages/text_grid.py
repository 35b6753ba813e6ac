"""The sample grid of a text-conditional stage."""

from typing import TYPE_CHECKING, Any, cast

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

    With a cache, which has no images, the first column shows the decoded latents. With a
    ControlNet, its control images come first.
    """
    captions, x0, control = batch["caption"], stage.latents(batch), stage.control(batch)
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
        shape = cast(tuple[int, int], size)
        options: Any = stage.grid_sampling
        return decoded(stage.sample(captions, size=shape, seeds=seeds, control=control, **options))

    with unsharded(stage):
        raw = sampled()
    with stage.ema.applied(stage):
        pred = stage.predict(xt, t, stage.text(captions), control)
        with_ema = sampled()
    denoised = stage.schedule.predict_x0(xt, t, pred)
    control_images = {} if control is None else {"control": cast(Tensor, control.images)}
    return control_images | {
        "original": (
            batch["image"] if "image" in batch else decoded(stage.scaling.denormalize(x0))
        ),
        "noised, t=0.5": decoded(stage.scaling.denormalize(xt)),
        "one step (EMA)": decoded(stage.scaling.denormalize(denoised)),
        "sample": raw,
        "sample (EMA)": with_ema,
    }
