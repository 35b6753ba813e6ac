"""The denoising loop of Stages B and C: conditions digested once, guidance, callbacks, a bar."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from wuerstchen_pl.diffusion.guidance import Guidance
from wuerstchen_pl.diffusion.sampler import Generator, Method, check_method, sample
from wuerstchen_pl.diffusion.schedule import CosineSchedule
from wuerstchen_pl.models.conditions import Digest, Inputs

Tensors = dict[str, Tensor]
Callback = Callable[[Any, int, Tensor, dict[str, Tensor | None]], Tensors | None]
"""(pipeline, step, time, tensors by name) -> those that it changed; None is what there is not."""
Step = Callable[[Tensor, Sequence[Inputs | Digest]], Tensor]


@dataclass(frozen=True, kw_only=True)
class How:
    """How to denoise; ``times`` fall from the start to 0."""

    times: Sequence[float]
    generator: Generator
    guidance: Guidance
    method: Method = "ddpm"
    callback: Callback | None = None
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
        check_method(self.method)
        for name in self.callback_inputs:
            if name not in tensors:
                raise ValueError(
                    f"callback_on_step_end_tensor_inputs={name!r} is unknown; choose from "
                    f"{', '.join(tensors)}"
                )


def denoise(
    step: Step,
    digest: Callable[[Mapping[str, Tensor]], Sequence[Inputs | Digest]],
    latents: Tensor,
    tensors: Tensors,
    how: How,
    *,
    owner: Any,
    schedule: CosineSchedule,
    constrain: Callable[[Tensor, float], Tensor] = lambda x, t: x,
) -> Tensor:
    """Follow a denoiser along ``how.times``.

    Args:
        step: latents and digests -> noise, as of ``Prior.step``.
        digest: the condition tensors -> the digests, of 2B rows (conditional, unconditional) if
            ``how.guidance`` is on, else of B.
        latents: (B, C, h, w) at the first time.
        tensors: the condition tensors by name, which a callback may see and change.
        how: times, guidance, generator, callback.
        owner: the pipeline that the callback is told of.
        schedule: the noise process.
        constrain: latents and their time -> what to go on from.

    Returns:
        (B, C, h, w) at the last time.
    """
    rows = len(latents)
    digests = digest(tensors)

    def predict(xt: Tensor, i: int) -> Tensor:
        if how.guidance.at(how.times[i]):
            both = step(xt, [d.at(i) for d in digests])  # two predictions of each row
            return how.guidance.combine(*both.chunk(2))
        return step(xt, [d.at(i).rows(rows) for d in digests])

    def after(i: int, x: Tensor) -> Tensor:
        nonlocal digests
        bar.update()
        x = constrain(x, how.times[i + 1])
        if how.callback is None:
            return x
        given = {name: {"latents": x, **tensors}.get(name) for name in how.callback_inputs}
        changed = how.callback(owner, i, torch.tensor(how.times[i]), given) or {}
        x = changed.get("latents", x)
        news = {k: v for k, v in changed.items() if k in tensors and v is not tensors[k]}
        if news:
            tensors.update(news)
            digests = digest(tensors)
        return x

    with tqdm(total=len(how.times) - 1, desc=how.bar, disable=how.bar is None) as bar:
        return sample(
            predict,
            latents,
            how.times,
            how.generator,
            schedule=schedule,
            method=how.method,
            on_step=after,
        )
