"""The denoising loop of Stages B and C: conditions digested once, guidance, callbacks, a bar."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from wuerstchen_pl.diffusion.guidance import Guidance
from wuerstchen_pl.diffusion.sampler import Generator, SamplerName, check_sampler, sample
from wuerstchen_pl.diffusion.schedule import CosineSchedule
from wuerstchen_pl.models.conditioning import BlockInputs, CachedConditioning

Tensors = dict[str, Tensor]
StepCallback = Callable[[Any, int, Tensor, dict[str, Tensor | None]], Tensors | None]
"""(pipeline, step, time, tensors by name) -> those that it changed; None is what there is not."""
PredictNoise = Callable[[Tensor, Sequence[BlockInputs | CachedConditioning]], Tensor]


@dataclass(frozen=True, kw_only=True)
class DenoiseParams:
    """How to denoise; ``times`` fall from the start to 0."""

    times: Sequence[float]
    generator: Generator
    guidance: Guidance
    method: SamplerName = "ddpm"
    callback: StepCallback | None = None
    callback_inputs: Sequence[str] = ("latents",)
    bar: str | None = None
    """Label of the progress bar; None shows none."""

    def check(self, tensors: Sequence[str]) -> None:
        """Refuse what would fail only once there is something to lose.

        Args:
            tensors: those that a callback may be given.

        Raises:
            ValueError: naming the argument and the fix.
        """
        check_sampler(self.method)
        for name in self.callback_inputs:
            if name not in tensors:
                raise ValueError(
                    f"callback_on_step_end_tensor_inputs={name!r} is unknown; choose from "
                    f"{', '.join(tensors)}"
                )


def denoise(
    predict_noise: PredictNoise,
    cache_conditioning: Callable[
        [Mapping[str, Tensor]], Sequence[BlockInputs | CachedConditioning]
    ],
    latents: Tensor,
    tensors: Tensors,
    params: DenoiseParams,
    *,
    pipeline: Any,
    schedule: CosineSchedule,
    latents_hook: Callable[[Tensor, float], Tensor] = lambda x, t: x,
) -> Tensor:
    """Follow a denoiser along ``params.times``.

    Args:
        predict_noise: latents and conditioning -> noise, as of ``Prior.predict_noise``.
        cache_conditioning: the condition tensors -> the conditioning, of 2B rows (conditional, unconditional) if
            ``params.guidance`` is on, else of B.
        latents: (B, C, h, w) at the first time.
        tensors: the condition tensors by name, which a callback may see and change.
        params: times, guidance, generator, callback.
        pipeline: the pipeline that the callback is told of.
        schedule: the noise process.
        latents_hook: latents and their time -> what to go on from.

    Returns:
        (B, C, h, w) at the last time.
    """
    rows = len(latents)
    conditioning = cache_conditioning(tensors)

    def predict(xt: Tensor, i: int) -> Tensor:
        if params.guidance.at(params.times[i]):
            both = predict_noise(
                xt, [c.at_step(i) for c in conditioning]
            )  # two predictions of each row
            return params.guidance.combine(*both.chunk(2))
        return predict_noise(xt, [c.at_step(i).first_rows(rows) for c in conditioning])

    def after(i: int, x: Tensor) -> Tensor:
        nonlocal conditioning
        bar.update()
        x = latents_hook(x, params.times[i + 1])
        if params.callback is None:
            return x
        given = {name: {"latents": x, **tensors}.get(name) for name in params.callback_inputs}
        changed = params.callback(pipeline, i, torch.tensor(params.times[i]), given) or {}
        x = changed.get("latents", x)
        news = {k: v for k, v in changed.items() if k in tensors and v is not tensors[k]}
        if news:
            tensors.update(news)
            conditioning = cache_conditioning(tensors)
        return x

    with tqdm(total=len(params.times) - 1, desc=params.bar, disable=params.bar is None) as bar:
        return sample(
            predict,
            latents,
            params.times,
            params.generator,
            schedule=schedule,
            method=params.method,
            on_step=after,
        )
